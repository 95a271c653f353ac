"""A row of labelled data: its values, and why it has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.records import Unusable

_CONVERSATIONS = ("conversations", "conversation", "messages", "dialog", "chat")


@dataclass(frozen=True)
class SourceRow:
    """A row of a split by its number, from 0; `fault` says why it has no values."""

    number: int
    place: str
    values: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""

    def get(self, column: str) -> Any:
        """Return a value. Raise Unusable if the row has no field of that name."""
        if self.fault:
            raise Unusable(self.fault)
        if column not in self.values:
            keys = ", ".join(map(str, list(self.values)[:8])) or "nothing"
            raise Unusable(f"no field {column!r}; it has {keys}{other_column(self.values)}")
        return self.values[column]

    def text(self, column: str) -> str:
        """Return a text. Raise Unusable if the field is not usable text."""
        return check_text(self.get(column), f"field {column!r}")


def other_column(names: Iterable[Any]) -> str:
    """Return advice if another column seems to hold the conversations."""
    found = next((name for name in names if name in _CONVERSATIONS), None)
    return f"; if {found!r} is meant, name it by finetune.data.messages_column" if found else ""


def check_text(value: Any, what: str, *, empty: bool = False) -> str:
    """Return a value that is text. Raise Unusable if it is not text, or is empty and `empty` is
    false.
    """
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
