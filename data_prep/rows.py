"""Rows of labelled data: their values, their faults, and the columns that a task reads."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.records import Unusable
from megalite.config import FinetuneConfig
from megalite.errors import DataError
from megalite.log import logger

Names = Sequence[str]

_CONVERSATIONS = ("conversations", "conversation", "messages", "dialog", "chat")
_NAMED = 5
_EDGES = re.compile("^[\\s\u200b-\u200d\u2060\ufeff]+|[\\s\u200b-\u200d\u2060\ufeff]+$")
_ENOUGH = 1000  # bad rows over what is allowed, after which none more is looked for


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
            raise Unusable(f"no field {column!r}; it has {keys}{other_column(self.values)}")
        return self.values[column]

    def text(self, column: str) -> str:
        """A text that can be used; `Unusable` else."""
        return check_text(self.get(column), f"field {column!r}")


def other_column(names: Iterable[Any]) -> str:
    """Advice if another column seems to hold the conversations."""
    found = next((name for name in names if name in _CONVERSATIONS), None)
    return f"; if {found!r} is meant, name it by finetune.data.messages_column" if found else ""


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


def strip_label(text: str) -> str:
    """Return a label without the white space and invisible characters at its ends."""
    return _EDGES.sub("", text)


def warn_of_similar(labels: Iterable[str]) -> None:
    """Log labels that a person would take for one, such as `Pos`, `pos` and `1`, `1.0`."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        key = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
        groups.setdefault(re.sub(r"(?<=\d)\.0+$", "", key), []).append(label)
    for group in groups.values():
        if len(group) > 1:
            shown = ", ".join(map(repr, group))
            logger.warning(
                "the labels %s differ only in case, space or form; each is one by itself", shown
            )


def label_name(value: Any, column: str, names: Sequence[str] | None) -> str:
    """A label's name: True, False, the digits of a number, or what the source calls it."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        if names is None:
            return str(value)
        if 0 <= value < len(names):
            return strip_label(names[value])
    elif isinstance(value, str) and (name := strip_label(value)):
        return name
    known = f", not one of {', '.join(names)}" if names else ", neither a whole number nor a name"
    raise Unusable(f"field {column!r} is {value!r:.40}{known}")


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
