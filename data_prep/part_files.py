"""Files of encoded parts: names, headers and hashes."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from megalite.files import parse_json


@dataclass
class Counts:
    """Counts of documents and tokens.

    Attributes:
        bytes: size of the documents as UTF-8 text.
        consumed: size of the part in the input files on disk.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    bad_records: int = 0
    consumed: int = 0

    def add(self, other: Counts) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class PartHeader:
    """Header of the file of an encoded part."""

    tally: Counts
    ended: bool  # whether this is the last part of the stream
    sha256: str  # of the file's arrays
    faults: list[str] = field(default_factory=list)  # the first bad records


def part_name(key: str, part: int) -> str:
    return f"{key}_{part:06d}"


def read_part_header(path: Path) -> PartHeader:
    """Return the header of a part's file."""
    with safe_open(path, framework="np") as file:
        content = parse_json(file.metadata()["part"])
    return PartHeader(**{**content, "tally": Counts(**content["tally"])})


def inspect_part(path: Path) -> PartHeader | None:
    """Return the header of a part's file. If the file is damaged, remove it and return None."""
    try:
        header = read_part_header(path)
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if sha256_of(arrays) == header.sha256:
            return header
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        pass
    path.unlink(missing_ok=True)
    return None


def sha256_of(arrays: dict[str, npt.NDArray[Any]]) -> str:
    """Return the hash of a part's arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
