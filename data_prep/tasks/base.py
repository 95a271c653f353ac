"""The base class of fine-tuning tasks."""

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
        architecture: the model's architecture.
        template: the text of the chat template; None if the task has none.
        label_names: the source's names for the numbers in the label column; None if it has none.
        unlabelled: whether rows may lack a label.
    """

    data: ExamplesConfig
    architecture: str
    template: str | None = None
    label_names: tuple[str, ...] | None = None
    unlabelled: bool = False


class ExampleTask:
    """A fine-tuning task, which makes examples from rows.

    Attributes:
        columns: columns that every row must have.
        optional: columns that are read if the source has them.
        labels: the number of each label; empty if the task has no labels.
    """

    def __init__(self, context: TaskContext) -> None:
        self.context = context
        self.columns = self.columns_of(context.data)
        self.optional: list[str] = []
        self.labels: dict[str, int] = {}

    @classmethod
    def columns_of(cls, data: ExamplesConfig) -> list[str]:
        """Return the columns that the task reads."""
        raise AssertionError(f"{cls.__name__} names no columns")

    def choose_labels(self, training_rows: Callable[[], Iterator[Fields]]) -> None:
        """Set `labels` before the first `encode`. Only tasks with labels read the rows."""

    def read(self, row: SourceRow) -> Fields:
        """Return the content of a row.

        Raises:
            Unusable: the row cannot be used.
        """
        return Fields(row, tuple(row.text(column) for column in self.columns))

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Set the tokenizer before examples are encoded.

        Raises:
            DataError: `finetune.data.max_length` leaves no room for text.
        """
        self.before, self.after = prefix_and_suffix_ids(tokenizer, add_bos=self.leads_with_bos())
        most = self.context.data.max_length
        if most <= len(self.before) + len(self.after):
            raise DataError(
                f"finetune.data.max_length {most}: BOS and EOS leave no room for text; raise it"
            )

    def leads_with_bos(self) -> bool:
        """Return whether a text begins with BOS even if the tokenizer adds no prefix."""
        return False

    def encode(self, fields: Fields, texts: Sequence[list[int]]) -> Example:
        """Return the example of a row.

        Args:
            texts: the ids of each of `fields.texts`.
        Raises:
            Unusable: the row cannot be used.
            DataError: a setting prevents the use of all rows.
        """
        raise AssertionError(f"{type(self).__name__} encodes no example")

    def split_arrays(self, arrays: SplitArrays, title: str, split: str) -> Arrays:
        """Return the arrays of a split that only this kind of task has.

        Args:
            title: name of the split in messages.
        """
        del title, split
        return {"learned": np.frombuffer(arrays.loss_mask, np.uint8)}

    def label_counts(self, arrays: SplitArrays) -> Mapping[str, int]:
        """Return the number of examples of each label; empty if the task has no labels."""
        del arrays
        return {}

    def report(self, title: str) -> None:
        """Log remarks on the rows of a split after they were encoded.

        Args:
            title: name of the split in messages.
        """
