"""What `--input` means: files, folders, globs and hub data sets, in an order that never varies.

corpus.jsonl              a file, by its ending: JSON lines (.jsonl .ndjson .json), Parquet
                          (.parquet), anything else one document of text; .gz and .zst inside
                          .jsonl.gz or .txt.zst are unpacked
"web/**/*.parquet"        a glob, quoted or expanded by the shell
src/                      a folder: every file below it, except names that begin with a dot
hf:NAME[:SPLIT]           a data set of the Hugging Face hub or a local folder of data files
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megalite.errors import CommandError
from megalite.log import logger

Kind = Literal["text", "jsonl", "parquet", "hub"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
PACKED = (".gz", ".zst")
_HUB = "hf:"


@dataclass(frozen=True)
class Unit:
    """A part of the input that is read from its beginning to its end, by one reader.

    The order of units, and of documents in each, is the order of documents in the shards. Units do
    not depend on who reads them.
    """

    source: int  # which --input it belongs to
    kind: Kind
    path: str  # NAME[:SPLIT] of a hub data set

    def __str__(self) -> str:
        return f"{_HUB}{self.path}" if self.kind == "hub" else self.path


def find_units(inputs: Sequence[str]) -> list[Unit]:
    """The units of all inputs, in the order given; in a glob or a folder by name.

    Raises:
        CommandError: an input that names nothing.
    """
    units: list[Unit] = []
    seen: set[str] = set()
    again = 0
    for source, name in enumerate(inputs):
        if name.startswith(_HUB):
            units.append(Unit(source, "hub", name.removeprefix(_HUB)))
            continue
        for path in _files(name):
            if (real := str(path.resolve())) in seen:
                again += 1
                continue
            seen.add(real)
            units.append(Unit(source, kind_of(path), str(path)))
    if again:
        logger.warning("%d files are named by two inputs; each is read once", again)
    return units


def kind_of(path: Path) -> Kind:
    """How a file is read, by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return _KINDS.get(suffixes[-1], "text") if suffixes else "text"


def _files(name: str) -> Iterator[Path]:
    path = Path(name)
    # a name with brackets is a file first, and a pattern only where there is no such file
    matches = [path] if path.exists() else sorted(Path(m) for m in glob.glob(name, recursive=True))
    count = 0
    for match in matches:
        for file in _below(match) if match.is_dir() else [match]:
            count += 1
            yield file
    if not count:
        what = "no file lies below" if path.is_dir() else "no file matches"
        raise CommandError(
            f"--input {name}: {what} it (working directory {Path.cwd()}); give a file, a folder, a "
            'glob such as "corpus/**/*.jsonl", or hf:NAME[:SPLIT]'
        )


def _below(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
