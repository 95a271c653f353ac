"""Detection of folders with a data set of the Hugging Face hub: a clone or a snapshot.

The files are named after splits, by the rules of `datasets`. README.md may be a data card, which
begins with YAML that lists the files of each split.
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
    """Return whether README.md is a data card that describes the folder's splits or features."""
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
    """Return whether a file is one of several of a split by its name: train-00000-of-00002."""
    match = _SHARD.search(name)
    return match is not None and int(match[2]) > 1


def split_of(path: str) -> str | None:
    """Return the split of a file by the rules of `datasets`: NAME-00000-of-00002, or by a word."""
    if sharded := re.search(r"([^/]+)-\d{5}-of-\d{5}", path):
        return sharded[1]
    match = _WORD.search(path.lower())
    return next((name for name, words in _KEYWORDS.items() if match and match[1] in words), None)


def check_corpus(folder: Path, files: Iterable[Path]) -> None:
    """Check that reading all files of a folder would mix no splits and read no data card as text.

    Args:
        files: all files of the folder. Folders of mostly other files, such as source code, pass.
    Raises:
        CommandError: it would. The message has the input to give instead.
    """
    names = [file.relative_to(folder).as_posix() for file in files]
    data = [name for name in names if _ending(name) in _DATA]
    if 2 * len(data) < len(names) or not data:
        return
    splits = {split for name in data if (split := split_of(name))}
    shown = ", ".join(sorted(splits)) or "train"
    first = "train" if "train" in splits or not splits else min(splits)
    if len(splits) > 1 and splits & _KEYWORDS.keys():  # other names are not splits
        raise CommandError(
            f"--input {folder}: the folder holds the splits {shown}, which would be mixed; name "
            f"one, as --input hf:{folder}:{first}, or name files"
        )
    if has_card(folder):
        raise CommandError(
            f"--input {folder}: {_CARD} is a data card, which would be read as a document; give "
            f"--input hf:{folder}:{first}, or name files"
        )


def _ending(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
