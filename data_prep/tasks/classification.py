"""Classification: [BOS] text [EOS], with the text truncated to fit; the label is the target."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.labels import describe_similar, label_name
from data_prep.records import Unusable
from data_prep.row import SourceRow
from data_prep.split_arrays import Example, Fields, SplitArrays
from data_prep.tasks.base import Arrays, ExampleTask, TaskContext
from data_prep.tasks.texts import require_tokens, surround
from megalite.config import ExamplesConfig
from megalite.errors import DataError
from megalite.log import logger

_LISTED = 20  # labels whose counts are logged


class Classification(ExampleTask):
    """The task "classification": a model learns the label of a text."""

    def __init__(self, context: TaskContext) -> None:
        super().__init__(context)
        if context.unlabelled:
            self.columns.remove(context.data.label_column)
            self.optional = [context.data.label_column]

    @classmethod
    def columns_of(cls, data: ExamplesConfig) -> list[str]:
        return [data.text_column, data.label_column]

    def leads_with_bos(self) -> bool:
        return self.context.architecture == "encoder"

    def choose_labels(self, training_rows: Callable[[], Iterator[Fields]]) -> None:
        """Set the labels of the run file, else the source's, else the sorted training labels.

        Raises:
            DataError: the run file has a label twice.
        """
        labels = self.context.data.labels or self.context.label_names
        if labels is None:
            rows_of_label = Counter(fields.label for fields in training_rows())
            for similar in describe_similar(rows_of_label):
                logger.warning(
                    "finetune.data.label_column %r: these similar values are different labels: %s "
                    "(rows of each); if they mean the same, use one spelling",
                    self.context.data.label_column,
                    similar,
                )
            are_numbers = all(re.fullmatch(r"-?\d+", label) for label in rows_of_label)
            labels = tuple(
                sorted(rows_of_label, key=lambda x: (int(x), x) if are_numbers else (0, x))
            )
        if len(set(labels)) != len(labels):
            raise DataError(f"finetune.data.labels {', '.join(labels)}: remove the repeated one")
        self.labels = {label: number for number, label in enumerate(labels)}

    def read(self, row: SourceRow) -> Fields:
        data = self.context.data
        text = row.text(data.text_column)
        if self.optional and self._means_no_label(row.values.get(data.label_column)):
            return Fields(row, (text,))
        label = row.get(data.label_column)
        if not isinstance(label, str) or label not in self.labels:
            label = label_name(label, data.label_column, self.context.label_names)
        if self.labels and label not in self.labels:
            names = ", ".join(map(repr, self.labels))
            raise Unusable(f"label {label!r} is none of {names}, the labels of the training rows")
        return Fields(row, (text,), label)

    def _means_no_label(self, label: Any) -> bool:
        """Return whether a value means no label: null, blank, NaN, or the hub's -1."""
        empty = label is None or label != label or (isinstance(label, str) and not label.strip())
        return empty or (str(label) == "-1" and "-1" not in self.labels)

    def encode(self, fields: Fields, texts: Sequence[list[int]]) -> Example:
        require_tokens(texts)
        most = self.context.data.max_length
        ids, is_cut = surround(texts[0], self.before, self.after, most)
        return Example(ids, (), is_cut=is_cut)

    def label_counts(self, arrays: SplitArrays) -> Mapping[str, int]:
        return dict(zip(self.labels, self._counts(arrays).tolist(), strict=True))

    def split_arrays(self, arrays: SplitArrays, title: str, split: str) -> Arrays:
        """Return the labels of a split, and log their distribution.

        Raises:
            DataError: all rows of the training split have the same label.
        """
        numbers = np.asarray(arrays.labels, np.int64)
        counts = self.label_counts(arrays)
        if title == "train":
            listed = [f"{label} {count:,}" for label, count in list(counts.items())[:_LISTED]]
            logger.info("train: %d labels: %s", len(counts), ", ".join(listed))
        missing = [label for label, count in counts.items() if not count]
        if missing and (numbers >= 0).all():
            logger.warning(
                "%s: no example of %s; macro averages count them as 0", title, ", ".join(missing)
            )
        if split == "train" and self.context.data.labels is None:
            self._require_two_labels(self._counts(arrays))
        return {"labels": numbers}

    def _require_two_labels(self, counts: npt.NDArray[np.int64]) -> None:
        if np.count_nonzero(counts) < 2:
            only = list(self.labels)[int(counts.argmax())]
            raise DataError(
                f"finetune.data.label_column {self.context.data.label_column!r}: all rows of the "
                f"training split are {only!r}; a classification needs two labels or more"
            )

    def _counts(self, arrays: SplitArrays) -> npt.NDArray[np.int64]:
        """Return the number of examples of each label, int64 [labels]."""
        numbers = np.asarray(arrays.labels, np.int64)
        return np.bincount(numbers[numbers >= 0], minlength=len(self.labels))
