"""Base of every fine-tuning task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.row import SourceRow
from data_prep.split_arrays import Example, Fields, SplitArrays
from megalite.config import ExamplesConfig
from megalite.errors import DataError
from megalite.formats.examples import prefix_and_suffix_ids
from megalite.tokenizers.tokenizer import Tokenizer

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class TaskContext:
    """Inputs of a task.

    Attributes:
        data: the section `finetune.data`.
        architecture: that of the model.
        template: the text of the chat template; None if the task has none.
        label_names: names that the source gives to the numbers in the label column; or None.
        unlabelled: whether rows may lack a label.
    """

    data: ExamplesConfig
    architecture: str
    template: str | None = None
    label_names: tuple[str, ...] | None = None
    unlabelled: bool = False


class ExampleTask:
    """A fine-tuning task.

    Attributes:
        columns: those that every row must have.
        optional: those that are read if the source has them.
        labels: the number of each label; empty if the task has no labels.
    """

    def __init__(self, context: TaskContext) -> None:
        self.context = context
        self.columns = self.columns_of(context.data)
        self.optional: list[str] = []
        self.labels: dict[str, int] = {}

    @classmethod
    def columns_of(cls, data: ExamplesConfig) -> list[str]:
        """Return the columns that the task learns from."""
        raise AssertionError(f"{cls.__name__} names no columns")

    def choose_labels(self, training_rows: Callable[[], Iterator[Fields]]) -> None:
        """Set `labels` before tokens are made; only a task with labels reads the rows for it."""

    def read(self, row: SourceRow) -> Fields:
        """Return the content of a row.

        Raises:
            Unusable: a row that gives no example.
        """
        return Fields(row, tuple(row.text(column) for column in self.columns))

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Set the tokenizer before examples are encoded.

        Raises:
            DataError: `max_length` leaves no token of a text.
        """
        self.before, self.after = prefix_and_suffix_ids(tokenizer, add_bos=self.leads_with_bos())
        most = self.context.data.max_length
        if most <= len(self.before) + len(self.after):
            raise DataError(
                f"finetune.data.max_length {most}: BOS and EOS leave no token of a text; give more"
            )

    def leads_with_bos(self) -> bool:
        """Return whether BOS precedes a text even if the tokenizer puts nothing there."""
        return False

    def encode(self, fields: Fields, texts: Sequence[list[int]]) -> Example:
        """Return the example of a row.

        Args:
            texts: the ids of each of `fields.texts`.
        Raises:
            Unusable: a row that gives no example.
            DataError: a setting that no row of this kind can be used with.
        """
        raise AssertionError(f"{type(self).__name__} encodes no example")

    def split_arrays(self, made: SplitArrays, called: str, split: str) -> Arrays:
        """Return the arrays of a split that only this kind of task has."""
        del called, split
        return {"learned": np.frombuffer(made.loss_mask, np.uint8)}

    def label_counts(self, made: SplitArrays) -> Mapping[str, int]:
        """Return the number of examples of each label; empty if the task has no labels."""
        del made
        return {}

    def report(self, called: str) -> None:
        """Log what was noticed while the rows of a split were encoded."""
