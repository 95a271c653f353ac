"""Documents out of files, one at a time: each is text, or a fault that names its place.

A record is at fault when its field is missing or is no text, when it is not whole JSON, not UTF-8,
empty, or holds a NUL. A file that cannot be read to its end, or a table without the column, is not
a matter of records and ends the command.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

from data_prep.inputs import Kind, Unit
from megalite.errors import DataError
from megalite.log import logger

_BUFFER = 1 << 20  # bytes
_ROWS = 256  # of a table held at once
_NAMED = 20


@dataclass(frozen=True)
class Fault:
    """A record that gives no document: lines count from 1, rows from 0."""

    place: str
    reason: str


Record: TypeAlias = "str | Fault"


class BadRecords:
    """Counts faults, names the first of them, and stops at one more than `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0

    def add(self, fault: Fault) -> None:
        """Count one fault; DataError where there were `limit` before it."""
        self.count += 1
        if self.count > self.limit:
            raise DataError(
                f"{fault.place}: {fault.reason}; bad record {self.count}, more than "
                f"--max-bad-records {self.limit} allows: mend the input, or allow more"
            )
        if self.count <= _NAMED:
            logger.warning("%s: %s; left out", fault.place, fault.reason)
        elif self.count == _NAMED + 1:
            logger.warning("further bad records are counted without being named")


def read_documents(unit: Unit, text_field: str, bad: BadRecords) -> Iterator[str]:
    """The good documents of a unit; memory holds one record, or a few rows of a table.

    Raises:
        DataError: a file that cannot be read to its end; a table without the column; more faults
            than `bad` allows.
    """
    for record in _READERS[unit.kind](unit, text_field):
        if isinstance(record, Fault):
            bad.add(record)
        else:
            yield record


def _read_text(unit: Unit, text_field: str) -> Iterator[Record]:
    with _open(unit) as file:
        data = _whole(unit, file.read)
    yield _from_bytes(data.removeprefix(codecs.BOM_UTF8), unit.path)


def _read_lines(unit: Unit, text_field: str) -> Iterator[Record]:
    with _open(unit) as file:
        number = 0
        while line := _whole(unit, file.readline):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line := line.strip():
                yield _from_json(line, text_field, f"{unit.path} line {number}")


def _read_table(unit: Unit, text_field: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(unit.path) as table:
            _find_column(unit, table.schema_arrow, text_field)
            row = 0
            for batch in table.iter_batches(_ROWS, columns=[text_field]):
                # as bytes, since Parquet may hold what is not UTF-8 in a column of strings
                for data in batch.column(0).cast(pa.large_binary()).to_pylist():
                    place = f"{unit.path} row {row}"
                    yield _from_bytes(data, place) if data is not None else Fault(place, "no text")
                    row += 1
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(unit, error) from error


def _read_hub(unit: Unit, text_field: str) -> Iterator[Record]:
    import datasets

    name, _, split = unit.path.partition(":")
    try:
        rows = iter(datasets.load_dataset(name, split=split or "train", streaming=True))
    except Exception as error:  # the library has no error of its own above all others
        raise _unreadable(unit, error) from error
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreadable(unit, error) from error
        if row is None:
            return
        yield _from_field(row, text_field, f"{unit} row {number}")
        number += 1


_READERS: dict[Kind, Callable[[Unit, str], Iterator[Record]]] = {
    "text": _read_text,
    "jsonl": _read_lines,
    "parquet": _read_table,
    "hub": _read_hub,
}


def _open(unit: Unit) -> IO[bytes]:
    """A file's bytes, unpacked; gzip files may have several members, zstd several frames."""
    try:
        if unit.path.endswith(".gz"):
            return io.BufferedReader(gzip.open(unit.path), _BUFFER)
        if unit.path.endswith(".zst"):
            import pyarrow as pa

            # pyarrow's reader tells a cut file from its end; zstandard's does not
            return io.BufferedReader(pa.input_stream(unit.path, "zstd", 0), _BUFFER)
        return open(unit.path, "rb", _BUFFER)
    except OSError as error:
        raise _unreadable(unit, error) from error


def _whole(unit: Unit, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(unit, error) from error


def _unreadable(unit: Unit, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{unit}: cannot be read to its end: {reason}")


def _find_column(unit: Unit, schema: Any, text_field: str) -> None:
    import pyarrow as pa

    if text_field not in schema.names:
        raise DataError(
            f"{unit}: no column {text_field!r}; it has {', '.join(schema.names)}: choose one with "
            "--text-field"
        )
    found = schema.field(text_field).type
    if not (pa.types.is_string(found) or pa.types.is_large_string(found)):
        raise DataError(f"{unit}: column {text_field!r} holds {found}, not strings")


def _from_json(line: bytes, text_field: str, place: str) -> Record:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Fault(place, f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Fault(place, f"not whole JSON: {error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        return Fault(place, f"not JSON that can be read: {error}")
    return _from_field(value, text_field, place)


def _from_field(value: Any, text_field: str, place: str) -> Record:
    if not isinstance(value, dict):
        return Fault(place, f"{value!r:.40} is not a JSON object")
    if text_field not in value:
        keys = ", ".join(map(str, list(value)[:8])) or "nothing"
        return Fault(place, f"no field {text_field!r}; it has {keys}")
    text = value[text_field]
    if not isinstance(text, str):
        return Fault(place, f"field {text_field!r} is {text!r:.40}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Fault(place, f"half a surrogate pair at character {error.start}")
    return _from_text(text, place)


def _from_bytes(data: bytes, place: str) -> Record:
    try:
        return _from_text(data.decode(), place)
    except UnicodeDecodeError as error:
        return Fault(place, f"not UTF-8 at byte {error.start}")


def _from_text(text: str, place: str) -> Record:
    if not text:
        return Fault(place, "an empty document")
    if "\0" in text:
        return Fault(place, f"a NUL at character {text.index(chr(0))}")
    return text
