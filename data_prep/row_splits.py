"""The rows of each split of a run: a split of the source, or a fraction of the training split."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from data_prep.records import Unusable
from data_prep.rows import BadRows, Source
from data_prep.split_arrays import Fields
from data_prep.tasks import ExampleTask
from megalite.config import ExamplesConfig
from megalite.errors import DataError

SPLITS = ("train", "valid", "test")


class RowSplits:
    """The usable rows of the splits "train", "valid" and "test". Every pass reads them again.

    Attributes:
        bad: counters of the unusable rows of each split.
        titles: names of the splits in messages.

    Args:
        seed: seed of the random choice of rows for `valid_fraction` and `test_fraction`.
        measured: name of the training split in messages if it is only evaluated; else "".
    Raises:
        DataError: the fractions leave a split without a row.
    """

    def __init__(
        self, source: Source, task: ExampleTask, data: ExamplesConfig, *, seed: int, measured: str
    ) -> None:
        self._source = source
        self._task = task
        self._data = data
        self.bad = {split: BadRows(data.max_bad_rows) for split in SPLITS}
        self.titles = {split: split for split in SPLITS} | {"train": measured or "train"}
        self._is_member = self._cut_fractions(seed)

    def names(self) -> list[str]:
        """Return the splits that the run has."""
        return [split for split in SPLITS if self._origin(split)]

    def rows(self, split: str) -> Iterator[Fields]:
        """Yield the fields of the usable rows, and count the others.

        Raises:
            DataError: there are more bad rows than allowed.
        """
        origin = self._origin(split)
        is_member = self._is_member.get(split)
        assert origin is not None
        for row in self._source.rows(origin, self._task.columns, self._task.optional):
            if is_member is None or is_member[row.number]:
                try:
                    fields = self._task.read(row)
                except Unusable as error:
                    self.bad[split].add(row, str(error))
                    continue
                yield fields
        self.bad[split].check()

    def empty_fault(self, split: str) -> DataError:
        """Return the error for a split without an example."""
        title = self.titles[split]
        if title == split:
            title = f"finetune.data.path {self._data.path}: the {split} split"
        return DataError(
            f"{title} has no example ({len(self.bad[split])} bad rows); give usable rows"
        )

    def _origin(self, split: str) -> str | None:
        """Return the split of the source from which a split is read."""
        if split in self._is_member:
            return self._data.train_split
        origin: str | None = getattr(self._data, f"{split}_split")
        return origin

    def _cut_fractions(self, seed: int) -> dict[str, npt.NDArray[np.bool_]]:
        """Return which rows of the training split each split has; {} without fractions."""
        data = self._data
        shares = {"test": data.test_fraction, "valid": data.valid_fraction}
        if not any(shares.values()):
            return {}
        rows = sum(1 for _ in self._source.rows(data.train_split, self._task.columns))
        if not rows:
            raise self.empty_fault("train")
        order = np.random.Generator(np.random.PCG64(seed)).permutation(rows)
        members = dict[str, npt.NDArray[np.bool_]]()
        start = 0
        for split, share in (*shares.items(), ("train", 1.0)):
            if not share:
                continue
            count = rows - start if split == "train" else round(share * rows)
            if count < 1:
                key = f"{split}_fraction {share}" if split != "train" else "fractions"
                raise DataError(
                    f"finetune.data.{key}: of the {rows} rows of {data.train_split!r} none is left "
                    f"for {split}; choose other fractions"
                )
            members[split] = np.zeros(rows, np.bool_)
            members[split][order[start : start + count]] = True
            start += count
        return members
