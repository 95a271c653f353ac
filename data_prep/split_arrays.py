"""A split of examples in memory: the fields of a row, and the arrays that grow by each example."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.messages import Messages
from data_prep.row import Row


@dataclass(frozen=True)
class Fields:
    """The content of a row, by the task."""

    row: Row
    texts: tuple[str, ...]
    label: str = ""
    messages: Messages = field(default_factory=list)
    tools: list[Any] | None = None


@dataclass
class SplitArrays:
    """The examples of a split as they grow."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    bounds: array[int] = field(default_factory=lambda: array("q", [0]))
    rows: array[int] = field(default_factory=lambda: array("q"))
    learned: bytearray = field(default_factory=bytearray)
    labels: array[int] = field(default_factory=lambda: array("q"))
    cut: int = 0

    def add(self, row: int, ids: Sequence[int], learned: Sequence[bool], cut: bool) -> None:
        """Append an example: its tokens, which of them are learned, and whether it was cut."""
        self.tokens.extend(ids)
        self.bounds.append(len(self.tokens))
        self.rows.append(row)
        self.learned.extend(learned)
        self.cut += cut
