"""Folders that hold a data set as the Hugging Face hub keeps it: a clone, or a snapshot.

Their files are named after splits, as `datasets` reads the names, and README.md may be a data card:
it begins with YAML that says which files are which split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from data_prep.compressed import COMPRESSED
from megalite.errors import CommandError

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORD = re.compile(
    "(?:^|[-._ 0-9/])({})(?:[-._ 0-9/]|$)".format(
        "|".join(word for words in _KEYWORDS.values() for word in words)
    )
)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})[-.]")
_DATA = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow")
_CARD = "README.md"


def has_card(folder: Path) -> bool:
    """Return whether README.md says which of the folder's files are which split, or what
    they hold.
    """
    try:
        with open(folder / _CARD, encoding="utf-8", errors="replace") as file:
            lines = file.read(1 << 20).splitlines()
    except OSError:
        return False
    if not lines or lines[0].rstrip() != "---":
        return False
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), len(lines))
    return any(re.match(r"(configs|dataset_info)\s*:", line) for line in lines[1:end])


def is_shard(name: str) -> bool:
    """Return whether a file's name says that there are others of its split:
    train-00000-of-00002.
    """
    found = _SHARD.search(name)
    return found is not None and int(found[2]) > 1


def split_of(path: str) -> str | None:
    """Return the split that `datasets` takes a file for: NAME-00000-of-00002, or by a word."""
    if sharded := re.search(r"([^/]+)-\d{5}-of-\d{5}", path):
        return sharded[1]
    found = _WORD.search(path.lower())
    return next((name for name, words in _KEYWORDS.items() if found and found[1] in words), None)


def check_corpus(folder: Path, files: Iterable[Path]) -> None:
    """Refuse a folder whose splits would be mixed, or whose data card would be read as a text.

    Args:
        files: all files that would be read. Folders of mostly other files, as of source code, pass.
    Raises:
        CommandError: names the splits, and the input to give instead.
    """
    names = [file.relative_to(folder).as_posix() for file in files]
    data = [name for name in names if _ending(name) in _DATA]
    if 2 * len(data) < len(names) or not data:
        return
    splits = {split for name in data if (split := split_of(name))}
    shown = ", ".join(sorted(splits)) or "train"
    first = "train" if "train" in splits or not splits else min(splits)
    if len(splits) > 1 and splits & _KEYWORDS.keys():  # else names of other things
        raise CommandError(
            f"--input {folder}: the folder holds the splits {shown}, which would be mixed; name "
            f"one, as --input hf:{folder}:{first}, or name files"
        )
    if has_card(folder):
        raise CommandError(
            f"--input {folder}: {_CARD} is a data card, which would be read as a text; give "
            f"--input hf:{folder}:{first}, or name files"
        )


def _ending(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
