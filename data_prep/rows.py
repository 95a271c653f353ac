"""Labelled rows: of JSON lines, CSV and Parquet files, and of data sets that `datasets` reads.

A source has splits. A folder's split NAME is its file NAME, or NAME with a known ending; a lone
file is one split.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_prep.packed import DAMAGE, PACKED, InputFile, naming
from data_prep.records import Unusable
from megalite.config import FinetuneConfig, RunConfig
from megalite.errors import DataError
from megalite.formats.tokenizer import load_tokenizer
from megalite.log import logger

Names = Sequence[str]

_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_BATCH = 1024  # rows
_NAMED = 5
_ENOUGH = 1000  # bad rows over what is allowed, after which none more is looked for
_CHOOSE = "rename one, or name another by finetune.data.text_column, label_column or the like"


@dataclass(frozen=True)
class Row:
    """A row of a split by its number, from 0; `fault` says why it has no values."""

    number: int
    place: str
    values: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""

    def get(self, column: str) -> Any:
        """A value; `Unusable` where the row has none of that name."""
        if self.fault:
            raise Unusable(self.fault)
        if column not in self.values:
            keys = ", ".join(map(str, list(self.values)[:8])) or "nothing"
            raise Unusable(f"no field {column!r}; it has {keys}")
        return self.values[column]

    def text(self, column: str) -> str:
        """A text that can be used; `Unusable` else."""
        return check_text(self.get(column), f"field {column!r}")


def check_text(value: Any, what: str, *, empty: bool = False) -> str:
    """The text that a value is; `Unusable` where it is none, or is empty unless that is allowed."""
    if not isinstance(value, str):
        raise Unusable(f"{what} is {value!r:.40}, not text")
    if not (value.strip() or empty):
        raise Unusable(f"{what} is empty")
    if "\0" in value:
        raise Unusable(f"{what} has a NUL at character {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{what} has half a surrogate pair at character {error.start}") from error
    return value


class BadRows:
    """Counts a split's rows with faults, each once; more than `limit` of them are refused."""

    def __init__(self, limit: int) -> None:
        self.limit, self._known, self._first = limit, set[int](), ""

    def __len__(self) -> int:
        return len(self._known)

    def add(self, row: Row, reason: str) -> None:
        """Count a row; DataError where so many were before it that there is no use in going on."""
        if row.number in self._known:
            return
        self._known.add(row.number)
        self._first = self._first or f"{row.place}: {reason}"
        if len(self) > self.limit + _ENOUGH:
            self.check("or more ")
        if len(self) <= _NAMED:
            logger.warning("%s: %s; left out", row.place, reason)
        elif len(self) == _NAMED + 1:
            logger.warning("further bad rows are counted without being named")

    def check(self, more: str = "") -> None:
        """DataError where there were too many."""
        if len(self) > self.limit:
            found = f"{len(self):,} {more}bad row{'s' if len(self) > 1 else ''}"
            raise DataError(
                f"{self._first}; {found}, more than finetune.data.max_bad_rows {self.limit} "
                "allows: mend the data, or allow more"
            )


def columns_of(section: FinetuneConfig) -> list[str]:
    """The columns that a task learns from."""
    data = section.data
    return {
        "classification": [data.text_column, data.label_column],
        "language_modeling": [data.text_column],
        "seq2seq": [data.text_column, data.target_column],
        "sft": [data.prompt_column, data.response_column]
        if data.prompt_column and data.response_column
        else [data.messages_column],
    }[section.task]


class Source(Protocol):
    """Where rows come from. Each method raises DataError for a split that is not there."""

    def identity(self, split: str) -> list[Any]:
        """What is equal if the split's rows are."""

    def rows(self, split: str, columns: Names, optional: Names = ()) -> Iterator[Row]:
        """All rows in order; DataError for a column that a table lacks, or for a damaged file.

        Args:
            optional: columns that are read, too, where they are there.
        """

    def label_names(self, split: str, column: str) -> tuple[str, ...] | None:
        """What the numbers in a column are called, where the source knows."""


def find_source(path: str, lone: str) -> Source:
    """The source that `finetune.data.path` means; `lone` names the split of a lone file.

    Raises:
        DataError: a file that is not there, or of another kind.
    """
    place = Path(path)
    if place.is_file():
        return _Files(place, lone)
    if place.is_dir():
        saved = any((place / f).is_file() for f in ("dataset_dict.json", "dataset_info.json"))
        return _Set(path, saved=True) if saved else _Files(place, lone)
    if place.is_absolute() or path.startswith((".", "~")) or _parts(path)[1]:
        raise DataError(
            f"finetune.data.path {path}: there is no such file or folder (working directory "
            f"{Path.cwd()}); name one, or a data set of the hub"
        )
    return _Set(path, saved=False)


def glance(config: RunConfig) -> str:
    """What the first rows of a run's examples, and its tokenizer, say before all are read.

    Raises:
        DataError: data that is not there, has other columns, or a vocabulary over the model's.
    """
    assert config.finetune is not None
    data, columns = config.finetune.data, columns_of(config.finetune)
    source = find_source(data.path, data.train_split)
    splits = [split for split in (data.train_split, data.valid_split, data.test_split) if split]
    for split in splits:
        first = next(source.rows(split, columns), None)
        if first is None:
            raise DataError(f"finetune.data.path {data.path}: the {split} split has no row")
        try:
            for column in columns:
                first.get(column)
        except Unusable as error:
            if data.max_bad_rows == 0:
                raise DataError(f"{first.place}: {error}; {_CHOOSE}") from None
    if data.tokenizer is not None:
        size, most = load_tokenizer(data.tokenizer).vocab_size, config.model.vocab_size
        if size > most:
            raise DataError(f"model.vocab_size: {most}, but the tokenizer has {size} ids; raise it")
    return f"{data.path}: {', '.join(splits)} with {', '.join(columns)}"


def _parts(name: str) -> tuple[str, str]:
    """A file's name without its ending, and that; "" where it is not a known one."""
    base = name[: name.rindex(".")] if name.lower().endswith(PACKED) else name
    stem, ending = os.path.splitext(base)
    return (stem, ending.lower()) if ending.lower() in _ENDINGS else (name, "")


class _Files:
    def __init__(self, place: Path, lone: str) -> None:
        self._place = place
        if place.is_file():
            self._files = {lone: [place]}
            return
        self._files = {}
        for file in sorted(place.iterdir()):
            if file.is_file() and _parts(file.name)[1]:
                self._files.setdefault(_parts(file.name)[0], []).append(file)
                self._files[file.name] = [file]

    def identity(self, split: str) -> list[Any]:
        file = self._file(split)
        status = file.stat()
        return [os.path.realpath(file), status.st_size, status.st_mtime_ns]

    def label_names(self, split: str, column: str) -> tuple[str, ...] | None:
        return None

    def rows(self, split: str, columns: Names, optional: Names = ()) -> Iterator[Row]:
        file = self._file(split)
        ending = _parts(file.name)[1]
        if ending == ".parquet":
            return _parquet_rows(str(file), columns, optional)
        if ending in (".csv", ".tsv"):
            return _csv_rows(str(file), columns, optional, "\t" if ending == ".tsv" else ",")
        return _json_rows(str(file), array=ending == ".json")

    def _file(self, split: str) -> Path:
        found = self._files.get(split, [])
        if len(found) == 1:
            if _parts(found[0].name)[1]:
                return found[0]
            raise DataError(
                f"{found[0]}: the ending says no kind of file that has rows; those are "
                f"{', '.join(_ENDINGS)}, and within {', '.join(PACKED)}"
            )
        files = {file.name for files in self._files.values() for file in files}
        names = sorted(files if self._place.is_dir() else self._files)
        several = f"{len(found)} files have the name" if found else "no such split"
        raise DataError(
            f"{self._place}: split {split!r}: {several}; it has {', '.join(names) or 'none'}"
        )


def _json_rows(path: str, *, array: bool) -> Iterator[Row]:
    """A row a line; a file `array` may hold all of them in one list instead."""
    with naming(path, (*DAMAGE, ValueError)), closing(InputFile(path)) as file:
        if array and file.bytes.peek().lstrip()[:1] == b"[":
            for number, value in enumerate(json.load(file.bytes)):
                yield _json_row(number, f"{path} row {number}", value)
            return
        number = 0
        for line_number, line in enumerate(file.bytes, 1):
            if line := line.strip():
                place = f"{path} line {line_number}"
                try:
                    row = _json_row(number, place, json.loads(line))
                except (ValueError, RecursionError) as error:
                    row = Row(number, place, fault=f"not JSON that can be read: {error}")
                yield row
                number += 1


def _json_row(number: int, place: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, place, value)
    return Row(number, place, fault=f"{value!r:.40} is not a JSON object")


def _csv_rows(path: str, columns: Names, optional: Names, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    damage = (*DAMAGE, UnicodeDecodeError, csv.Error)
    with naming(path, damage), closing(InputFile(path)) as file:
        text = io.TextIOWrapper(file.bytes, "utf-8-sig", newline="")
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        header = reader.fieldnames or ()
        _check_columns(path, header, columns, optional)
        for number, values in enumerate(reader):
            place = f"{path} row {number} (to line {reader.line_num})"
            found = len(header) - list(values.values()).count(None) + len(values.pop(None, ()))
            wrong = found != len(header)
            yield Row(number, place, values, f"{found} fields, not {len(header)}" if wrong else "")


def _parquet_rows(path: str, columns: Names, optional: Names) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    damage = (OSError, pa.ArrowException, UnicodeDecodeError)
    with naming(path, damage), closing(pq.ParquetFile(path)) as table:
        read = _check_columns(path, table.schema_arrow.names, columns, optional)
        batches = table.iter_batches(_BATCH, columns=read, use_threads=False)
        yield from _table_rows(path, batches)


def _table_rows(path: str, tables: Iterator[Any]) -> Iterator[Row]:
    values = (row for table in tables for row in table.to_pylist())
    return (Row(n, f"{path} row {n}", row) for n, row in enumerate(values))


def _check_columns(path: str, names: Names, columns: Names, optional: Names = ()) -> list[str]:
    """What is read: `columns`, each of which is there once, and those of `optional` there are."""
    read = [*columns, *(column for column in optional if column in names)]
    for column in read:
        if (count := list(names).count(column)) != 1:
            told = "several columns are named" if count else "no column"
            have = ", ".join(names) or "none"
            raise DataError(f"{path}: {told} {column!r}; it has {have}: {_CHOOSE}")
    return read


class _Set:
    """NAME[@CONFIG] of the hub, or a folder that `save_to_disk` wrote."""

    def __init__(self, name: str, *, saved: bool) -> None:
        self._name, self._saved = name, saved
        self._open: dict[str, Any] = {}

    def identity(self, split: str) -> list[Any]:
        return [self._name, split, self._split(split)._fingerprint]

    def label_names(self, split: str, column: str) -> tuple[str, ...] | None:
        names = getattr(self._split(split).features.get(column), "names", None)
        return tuple(names) if names else None

    def rows(self, split: str, columns: Names, optional: Names = ()) -> Iterator[Row]:
        found = self._split(split)
        read = _check_columns(self._name, found.column_names, columns, optional)
        with naming(self._name, (Exception,)):
            tables = found.select_columns(read).with_format("arrow").iter(_BATCH)
            yield from _table_rows(f"{self._name} split {split}", tables)

    def _split(self, split: str) -> Any:
        if split not in self._open:
            try:
                self._open[split] = self._load(split)
            except DataError:
                raise
            except Exception as error:  # the library has no error of its own above all others
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DataError(
                    f"{self._name} (split {split!r}): cannot be opened as a data set: {reason}; "
                    "local files work offline: see finetune.data.path"
                ) from error
        return self._open[split]

    def _load(self, split: str) -> Any:
        import datasets

        if not self._saved:
            name, _, config = self._name.partition("@")
            return datasets.load_dataset(name, config or None, split=split)
        found = datasets.load_from_disk(self._name)
        splits = found if isinstance(found, dict) else {str(found.split or split): found}
        if split not in splits:
            raise DataError(f"{self._name}: no split {split!r}; it has {', '.join(splits)}")
        return splits[split]
