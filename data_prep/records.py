"""A record is a document's text, or a fault that names its place.

A record is a fault if its field is missing or is no text, if it is not complete JSON, not UTF-8,
empty, or contains a NUL.
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
    """A record that gives no document: lines count from 1, rows from 0."""

    place: str
    reason: str


Record: TypeAlias = "str | BadRecord"
Value = TypeVar("Value")


class Unusable(ValueError):
    """Why a record gives no document; its reader adds the place and makes it a `BadRecord`."""


class BadRecordCounter:
    """Counter of faults that logs the first ones and stops at one more than `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    def add(self, fault: BadRecord) -> None:
        """Count one fault. Raise DataError if `limit` faults came before it."""
        self.count += 1
        if self.count > self.limit:
            raise DataError(
                f"{fault.place}: {fault.reason}; bad record {self.count}, more than "
                f"--max-bad-records {self.limit} allows: fix the input, or allow more"
            )
        if self.count <= _NAMED:
            logger.warning("%s: %s; omitted", fault.place, fault.reason)
        elif self.count == _NAMED + 1:
            logger.warning("further bad records are counted without being named")


def records(
    values: Iterable[Value], text_of: Callable[[Value], str], place: Callable[[int], str]
) -> Iterator[Record]:
    """Yield the document in each value, or a fault. `place` names the n-th value, from 0."""
    for number, value in enumerate(values):
        record: Record
        try:
            record = text_of(value)
        except Unusable as error:
            record = BadRecord(place(number), str(error))
        yield record


def text_of_json(line: bytes, text_field: str) -> str:
    """Return the document in a line of JSON without white space around it. Raise Unusable if it has
    none.
    """
    try:  # more than twice as fast as json, but it does not distinguish faults
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
        raise Unusable(f"not whole JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise Unusable(f"not JSON that can be read: {error}") from error


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
    """Return bytes as a document; None is a table's null. Raise Unusable if there is none."""
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
