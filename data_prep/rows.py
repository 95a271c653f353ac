"""Labelled rows: of JSON lines, CSV and Parquet files, and of data sets that `datasets` reads.

A source has splits. A folder's split NAME is its file NAME, or NAME with a known ending, or what
`datasets` finds there, as in a clone of a hub data set. A single file is one split.
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
_ENOUGH = 1000  # bad rows over what is allowed, after which none more is looked for


class BadRows:
    """Counter of a split's unusable rows, each once, which refuses more than `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._known = set[int]()
        self._first = ""

    def __len__(self) -> int:
        return len(self._known)

    def add(self, row: SourceRow, reason: str) -> None:
        """Count a row. Raise DataError when so many rows are bad that the rest need not be read."""
        if row.number in self._known:
            return
        self._known.add(row.number)
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
            found = f"{len(self):,} {more}bad row{'s' if len(self) > 1 else ''}"
            raise DataError(
                f"{self._first}; {found}, more than finetune.data.max_bad_rows {self.limit} "
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
    """Return the source that `finetune.data.path` names. `split` names the split of a single file.

    Raises:
        DataError: a file that is not there, or of another kind.
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
    """Return whether a path that names nothing was meant for a file, not for a set of the hub."""
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
        found = self._files.get(split, [])
        if len(found) == 1:
            if _parts(found[0].name)[1]:
                return found[0]
            raise DataError(
                f"{found[0]}: the ending says no kind of file that has rows; those are "
                f"{', '.join(_ENDINGS)}, and within {', '.join(COMPRESSED)}"
            )
        files = {file.name for files in self._files.values() for file in files}
        names = sorted(files if self._place.is_dir() else self._files)
        several = f"{len(found)} files have the name" if found else "no such split"
        raise DataError(
            f"{self._place}: split {split!r}: {several}; it has {', '.join(names) or 'none'}"
        )


class _Folder:
    """A folder with a file a split, or with the splits that `datasets` sees in it."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._files = _Files(place, "")
        self._set = _Set(str(place), saved=False)
        self._card = has_card(place)
        self._seen: tuple[str, ...] | None = None

    def identity(self, split: str) -> list[Any]:
        return self._source(split).identity(split)

    def label_names(self, split: str, column: str) -> tuple[str, ...] | None:
        return self._source(split).label_names(split, column)

    def rows(self, split: str, columns: Names, optional: Names = ()) -> Iterator[SourceRow]:
        return self._source(split).rows(split, columns, optional)

    def _source(self, split: str) -> Source:
        """Return the source of a split: the file of its name, unless a data card says otherwise."""
        if not self._card and split in self._files:
            return self._files
        if self._seen is None:
            self._seen = self._set.splits()
        if split in self._seen:
            return self._set
        if split in self._files or not self._seen or (self._files and not self._card):
            return self._files  # which names what it has
        raise DataError(
            f"{self._place}: split {split!r}: no such split; it has {', '.join(self._seen)}"
        )


class _Set:
    """NAME[@CONFIG] of the hub or a folder, or a folder that `save_to_disk` wrote."""

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
        found = self._split(split)
        read = check_columns(self._name, found.column_names, columns, optional)
        with named_damage(self._name, (Exception,)):
            tables = found.select_columns(read).with_format("arrow").iter(BATCH)
            yield from table_rows(f"{self._name} split {split}", tables)

    def splits(self) -> tuple[str, ...]:
        """Return the splits of a folder of data files; () if `datasets` finds no data there."""
        import datasets

        try:
            builder = datasets.load_dataset_builder(self._name)
        except Exception as error:  # the library has no error of its own above all others
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
            except Exception as error:  # the library has no error of its own above all others
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
        found = datasets.load_from_disk(name)
        splits = found if isinstance(found, dict) else {str(found.split or split): found}
        if split not in splits:
            raise DataError(f"{name}: no split {split!r}; it has {', '.join(splits)}")
        return splits[split]

    def _unopened(self, error: Exception, where: str = "") -> DataError:
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "local files work offline: see finetune.data.path"
        if "Config name" in reason:
            advice = f"name one, as {self._name}@CONFIG"
        return DataError(f"{self._name}{where}: cannot be opened as a data set: {reason}; {advice}")
