"""Rows of the data for fine-tuning, and checks of their values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.records import Unusable

_CONVERSATIONS = ("conversations", "conversation", "messages", "dialog", "chat")


@dataclass(frozen=True)
class SourceRow:
    """A row of a split.

    Attributes:
        number: the row's number in the split, from 0.
        place: name of the row's place in messages.
        values: the row's values by column.
        fault: the reason why the row has no values; "" if it has.
    """

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
        """Return a text. Raise Unusable if the field is missing or not usable text."""
        return check_text(self.get(column), f"field {column!r}")


def other_column(names: Iterable[Any]) -> str:
    """Return advice if another column seems to hold the conversations."""
    match = next((name for name in names if name in _CONVERSATIONS), None)
    return f"; if {match!r} is meant, name it by finetune.data.messages_column" if match else ""


def check_text(value: Any, what: str, *, empty: bool = False) -> str:
    """Return a value if it is text, or raise Unusable.

    Args:
        what: name of the value in messages.
        empty: If true, accept empty text.
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
