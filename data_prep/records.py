"""Records: the text of a document, or a bad record with its place and reason.

A record is bad if it is empty, contains a NUL, or is not UTF-8. A JSON record is also bad if it is
incomplete, or if its field is missing or not text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from pydantic_core import from_json

from megalite.errors import DataError
from megalite.log import logger

_NAMED = 20


@dataclass(frozen=True)
class BadRecord:
    """A record without a usable document. Lines are counted from 1, rows from 0."""

    place: str
    reason: str


Record: TypeAlias = "str | BadRecord"
Value = TypeVar("Value")


class Unusable(ValueError):
    """The reason why a record has no usable document, from which a `BadRecord` is made."""


class BadRecordCounter:
    """Counter of bad records that logs the first ones and allows at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    def add(self, record: BadRecord) -> None:
        """Count a bad record. Raise DataError if there are more than `limit`."""
        self.count += 1
        if self.count > self.limit:
            raise DataError(
                f"{record.place}: {record.reason}; bad record {self.count}, more than "
                f"--max-bad-records {self.limit} allows: fix the input, or allow more"
            )
        if self.count <= _NAMED:
            logger.warning("%s: %s; omitted", record.place, record.reason)
        elif self.count == _NAMED + 1:
            logger.warning("further bad records are counted without being named")


def records(
    values: Iterable[Value], text_of: Callable[[Value], str], place: Callable[[int], str]
) -> Iterator[Record]:
    """Yield the document in each value, or a bad record.

    Args:
        text_of: function that returns the document in a value, or raises Unusable.
        place: function that returns the name of the n-th value's place, from 0.
    """
    for number, value in enumerate(values):
        record: Record
        try:
            record = text_of(value)
        except Unusable as error:
            record = BadRecord(place(number), str(error))
        yield record


def text_of_json(line: bytes, text_field: str) -> str:
    """Return the document in a stripped line of JSON. Raise Unusable if it has none."""
    try:  # twice as fast as json, but without reasons for faults
        text = from_json(line)[text_field]
        if text.__class__ is str and text and "\0" not in text:
            return str(text)
    except (ValueError, LookupError, TypeError):
        pass
    return _text_of_field(_decode_json(line), text_field)


def _decode_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise Unusable(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        if 0 in line:
            raise Unusable(f"a NUL at byte {line.index(0)}") from error
        raise Unusable(f"not valid JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise Unusable(f"not readable JSON: {error}") from error


def _text_of_field(value: Any, text_field: str) -> str:
    if not isinstance(value, dict):
        raise Unusable(f"{value!r:.40} is not a JSON object")
    if text_field not in value:
        keys = ", ".join(map(str, list(value)[:8])) or "nothing"
        raise Unusable(f"no field {text_field!r}; it has {keys}")
    text = value[text_field]
    if not isinstance(text, str):
        raise Unusable(f"field {text_field!r} is {text!r:.40}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"half a surrogate pair at character {error.start}") from error
    return _checked(text)


def text_of_bytes(data: bytes | None) -> str:
    """Return the document in bytes, or in a table's null. Raise Unusable if there is none."""
    if data is None:
        raise Unusable("null, not text")
    try:
        return _checked(data.decode())
    except UnicodeDecodeError as error:
        raise Unusable(f"not UTF-8 at byte {error.start}") from error


def _checked(text: str) -> str:
    if not text:
        raise Unusable("an empty document")
    if "\0" in text:
        raise Unusable(f"a NUL at character {text.index(chr(0))}")
    return text
