"""A split of examples in memory: the fields of a row, its example, and the split's arrays."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data_prep.messages import Messages
from data_prep.row import SourceRow


@dataclass(frozen=True)
class Fields:
    """The fields of a row that a task uses."""

    row: SourceRow
    texts: tuple[str, ...]
    label: str = ""
    messages: Messages = field(default_factory=list)
    tools: list[Any] | None = None


class Example(NamedTuple):
    """An example as tokens.

    Attributes:
        ids: the tokens.
        loss_mask: whether each token is a target; empty if a label is the target.
        is_cut: whether the example was truncated.
    """

    ids: Sequence[int]
    loss_mask: Sequence[bool]
    is_cut: bool


@dataclass
class SplitArrays:
    """The examples of a split, in arrays that grow."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    bounds: array[int] = field(default_factory=lambda: array("q", [0]))
    rows: array[int] = field(default_factory=lambda: array("q"))
    loss_mask: bytearray = field(default_factory=bytearray)
    labels: array[int] = field(default_factory=lambda: array("q"))
    cut: int = 0

    def add(self, row: int, example: Example, label: int) -> None:
        """Append an example.

        Args:
            row: number of its row.
            label: number of its label; -1 means that it has none.
        """
        self.tokens.extend(example.ids)
        self.bounds.append(len(self.tokens))
        self.rows.append(row)
        self.loss_mask.extend(example.loss_mask)
        self.labels.append(label)
        self.cut += example.is_cut
