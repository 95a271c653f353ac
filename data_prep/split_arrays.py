"""Examples in memory: the fields of a row, its tokens, and the arrays of a split."""

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
    """The tokens of an example.

    Attributes:
        ids: ids of the tokens.
        loss_mask: whether each token is a target. Empty if the target is a label.
        is_cut: whether the example was truncated.
    """

    ids: Sequence[int]
    loss_mask: Sequence[bool]
    is_cut: bool


@dataclass
class SplitArrays:
    """The examples of a split, in growing arrays.

    Attributes:
        tokens: ids of all tokens, one example after the other.
        bounds: the offset in `tokens` of each example, and the end of the last example.
        rows: the row number of each example.
        loss_mask: whether each token is a target. Empty if the targets are labels.
        labels: the label number of each example; -1 means no label.
        cut: number of truncated examples.
    """

    tokens: array[int] = field(default_factory=lambda: array("i"))
    bounds: array[int] = field(default_factory=lambda: array("q", [0]))
    rows: array[int] = field(default_factory=lambda: array("q"))
    loss_mask: bytearray = field(default_factory=bytearray)
    labels: array[int] = field(default_factory=lambda: array("q"))
    cut: int = 0

    def add(self, row: int, example: Example, label: int) -> None:
        """Append an example.

        Args:
            row: number of the example's row.
            label: number of the example's label; -1 means no label.
        """
        self.tokens.extend(example.ids)
        self.bounds.append(len(self.tokens))
        self.rows.append(row)
        self.loss_mask.extend(example.loss_mask)
        self.labels.append(label)
        self.cut += example.is_cut
