"""Files of encoded parts: their names, their headers, and whether they are intact."""

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
    """Counts of documents and tokens; `bytes` are of UTF-8 text, `consumed` of files on disk."""

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
    ended: bool  # no part of the stream follows
    sha256: str  # of the file's arrays
    faults: list[str] = field(default_factory=list)


def part_name(key: str, part: int) -> str:
    return f"{key}_{part:06d}"


def read_header(path: Path) -> PartHeader:
    """Return the header of a part's file."""
    with safe_open(path, framework="np") as file:
        found = parse_json(file.metadata()["part"])
    return PartHeader(**{**found, "tally": Counts(**found["tally"])})


def inspect_part(path: Path) -> PartHeader | None:
    """Return the header of a part's file. If its hash is wrong, remove the file and return None."""
    try:
        made = read_header(path)
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if sha256_of(arrays) == made.sha256:
            return made
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
