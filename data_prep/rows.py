"""Sources of rows for fine-tuning: JSON, CSV and Parquet files, and data sets of `datasets`.

A source has splits. A single file is one split. The split NAME of a folder is its file NAME, with
or without a known ending. It may also be a split that `datasets` finds, as in clones of the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from data_prep.clones import has_card, is_shard
from data_prep.compressed import COMPRESSED, named_damage
from data_prep.hf_datasets import check_reachable
from data_prep.row import SourceRow
from data_prep.row_files import (
    BATCH,
    Names,
    check_columns,
    csv_rows,
    json_rows,
    parquet_rows,
    table_rows,
)
from megalite.errors import DataError
from megalite.log import logger

_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_NAMED = 5
_ENOUGH = 1000  # bad rows beyond the limit after which the rest is not read


class BadRows:
    """Counter of a split's unusable rows, which allows at most `limit`. A row counts once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._numbers = set[int]()
        self._first = ""

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, row: SourceRow, reason: str) -> None:
        """Count a row. Raise DataError if far more rows are bad than allowed."""
        if row.number in self._numbers:
            return
        self._numbers.add(row.number)
        self._first = self._first or f"{row.place}: {reason}"
        if len(self) > self.limit + _ENOUGH:
            self.check("or more ")
        if len(self) <= _NAMED:
            logger.warning("%s: %s; omitted", row.place, reason)
        elif len(self) == _NAMED + 1:
            logger.warning("further bad rows are counted without being named")

    def check(self, more: str = "") -> None:
        """Raise DataError if there were too many bad rows."""
        if len(self) > self.limit:
            count = f"{len(self):,} {more}bad row{'s' if len(self) > 1 else ''}"
            raise DataError(
                f"{self._first}; {count}, more than finetune.data.max_bad_rows {self.limit} "
                "allows: fix the data, or allow more"
            )


class Source(Protocol):
    """Source of rows. Each method raises DataError for a split that does not exist."""

    def identity(self, split: str) -> list[Any]:
        """Return a value that is equal if the rows of the split are equal."""

    def rows(self, split: str, columns: Names, optional: Names = ()) -> Iterator[SourceRow]:
        """Yield all rows in order. Raise DataError for a missing column or a damaged file.

        Args:
            optional: columns that are also read, if the source has them.
        """

    def label_names(self, split: str, column: str) -> tuple[str, ...] | None:
        """Return the names of the numbers in a column; None if the source has none."""


def find_source(path: str, split: str) -> Source:
    """Return the source of `finetune.data.path`.

    Args:
        split: name of the split of a single file.
    Raises:
        DataError: there is no such file.
    """
    place = Path(path)
    if place.is_file():
        if is_shard(place.name):
            logger.warning("%s: one of several files of a split; name its folder for all", path)
        return _Files(place, split)
    if place.is_dir():
        saved = any((place / f).is_file() for f in ("dataset_dict.json", "dataset_info.json"))
        return _Set(path, saved=True) if saved else _Folder(place)
    if Path(path.rpartition("@")[0] or ".gone").is_dir():  # FOLDER@CONFIG
        return _Set(path, saved=False)
    if place.is_absolute() or path.startswith((".", "~")) or _looks_like_file(path):
        raise DataError(
            f"finetune.data.path {path}: there is no such file or folder (working directory "
            f"{Path.cwd()}); name one, or a data set of the hub"
        )
    return _Set(path, saved=False)


def _looks_like_file(path: str) -> bool:
    """Return whether a path that does not exist means a file, not a data set on the hub."""
    place = Path(path)
    ending = re.fullmatch(r"\.[A-Za-z]{1,6}\d?", place.suffix)
    here = place.parent == Path() or place.parent.is_dir()
    return bool(_parts(path)[1] or (ending and here) or path.count("/") > 1)


def _parts(name: str) -> tuple[str, str]:
    """Return a file's name without its ending, and the ending; "" if the ending is unknown."""
    base = name[: name.rindex(".")] if name.lower().endswith(COMPRESSED) else name
    stem, ending = os.path.splitext(base)
    return (stem, ending.lower()) if ending.lower() in _ENDINGS else (name, "")


class _Files:
    def __init__(self, place: Path, split: str) -> None:
        self._place = place
        if place.is_file():
            self._files = {split: [place]}
            return
        self._files = {}
        for file in sorted(place.iterdir()):
            if file.is_file() and _parts(file.name)[1]:
                self._files.setdefault(_parts(file.name)[0], []).append(file)
                self._files[file.name] = [file]

    def __contains__(self, split: str) -> bool:
        return split in self._files

    def __len__(self) -> int:
        return len(self._files)

    def identity(self, split: str) -> list[Any]:
        file = self._file(split)
        status = file.stat()
        return [os.path.realpath(file), status.st_size, status.st_mtime_ns]

    def label_names(self, split: str, column: str) -> tuple[str, ...] | None:
        return None

    def rows(self, split: str, columns: Names, optional: Names = ()) -> Iterator[SourceRow]:
        file = self._file(split)
        ending = _parts(file.name)[1]
        if ending == ".parquet":
            return parquet_rows(str(file), columns, optional)
        if ending in (".csv", ".tsv"):
            return csv_rows(str(file), columns, optional, "\t" if ending == ".tsv" else ",")
        return json_rows(str(file), array=ending == ".json")

    def _file(self, split: str) -> Path:
        matches = self._files.get(split, [])
        if len(matches) == 1:
            if _parts(matches[0].name)[1]:
                return matches[0]
            raise DataError(
                f"{matches[0]}: got an unknown ending; use one of {', '.join(_ENDINGS)}, also "
                f"compressed ({', '.join(COMPRESSED)})"
            )
        files = {file.name for files in self._files.values() for file in files}
        names = sorted(files if self._place.is_dir() else self._files)
        fault = f"{len(matches)} files have the name" if matches else "no such split"
        raise DataError(
            f"{self._place}: split {split!r}: {fault}; it has {', '.join(names) or 'none'}"
        )


class _Folder:
    """A folder with a file for each split, or with the splits that `datasets` finds in it."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._files = _Files(place, "")
        self._set = _Set(str(place), saved=False)
        self._card = has_card(place)
        self._splits: tuple[str, ...] | None = None

    def identity(self, split: str) -> list[Any]:
        return self._source(split).identity(split)

    def label_names(self, split: str, column: str) -> tuple[str, ...] | None:
        return self._source(split).label_names(split, column)

    def rows(self, split: str, columns: Names, optional: Names = ()) -> Iterator[SourceRow]:
        return self._source(split).rows(split, columns, optional)

    def _source(self, split: str) -> Source:
        """Return the source of a split: the file of its name, or `datasets` with a data card."""
        if not self._card and split in self._files:
            return self._files
        if self._splits is None:
            self._splits = self._set.splits()
        if split in self._splits:
            return self._set
        if split in self._files or not self._splits or (self._files and not self._card):
            return self._files  # whose error lists its splits
        raise DataError(
            f"{self._place}: split {split!r}: no such split; it has {', '.join(self._splits)}"
        )


class _Set:
    """A data set of `datasets`: NAME[@CONFIG], on the hub or a folder, or saved to disk."""

    def __init__(self, name: str, *, saved: bool) -> None:
        self._name = name
        self._saved = saved
        self._open: dict[str, Any] = {}

    def identity(self, split: str) -> list[Any]:
        return [self._name, split, self._split(split)._fingerprint]

    def label_names(self, split: str, column: str) -> tuple[str, ...] | None:
        names = getattr(self._split(split).features.get(column), "names", None)
        return tuple(names) if names else None

    def rows(self, split: str, columns: Names, optional: Names = ()) -> Iterator[SourceRow]:
        rows = self._split(split)
        read = check_columns(self._name, rows.column_names, columns, optional)
        with named_damage(self._name, (Exception,)):
            tables = rows.select_columns(read).with_format("arrow").iter(BATCH)
            yield from table_rows(f"{self._name} split {split}", tables)

    def splits(self) -> tuple[str, ...]:
        """Return the splits of a folder of data files, or () if `datasets` finds no data in it."""
        import datasets

        try:
            builder = datasets.load_dataset_builder(self._name)
        except Exception as error:  # the library's errors have no common base class
            if has_card(Path(self._name)):
                raise self._unopened(error) from error
            return ()
        return tuple(map(str, builder.config.data_files or builder.info.splits or ()))

    def _split(self, split: str) -> Any:
        if split not in self._open:
            try:
                self._open[split] = self._load(split)
            except DataError:
                raise
            except Exception as error:  # the library's errors have no common base class
                raise self._unopened(error, f" (split {split!r})") from error
        return self._open[split]

    def _load(self, split: str) -> Any:
        name = self._name
        config = ""
        if not self._saved and not Path(name).is_dir():
            name, _, config = name.rpartition("@") if "@" in name else (name, "", "")
            if not Path(name).is_dir():
                check_reachable(name, f"finetune.data.path {name}")  # before a slow import
        import datasets

        if not self._saved:
            return datasets.load_dataset(name, config or None, split=split)
        saved = datasets.load_from_disk(name)
        splits = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
        if split not in splits:
            raise DataError(f"{name}: no split {split!r}; it has {', '.join(splits)}")
        return splits[split]

    def _unopened(self, error: Exception, where: str = "") -> DataError:
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "local files work offline: see finetune.data.path"
        if "Config name" in reason:
            advice = f"name one, as {self._name}@CONFIG"
        return DataError(f"{self._name}{where}: cannot be opened as a data set: {reason}; {advice}")
