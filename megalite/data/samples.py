"""The interface of a data set: samples by number, in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from megalite.data.batch import Batch
from megalite.data.order import Ints


class Samples(Protocol):
    """Samples of training or evaluation data, each a function of its number.

    The loader reads a step in three calls: `sort_by_length` orders the samples, which assigns them
    to ranks, `source_of` locates them, and `read` returns one micro-batch.

    Attributes:
        num_samples: number of samples in an epoch.
        content_fingerprint: a hash of the data that does not depend on the order of samples.
        tokenizer_sha256: hash of the tokenizer's file; empty if the tokenizer is unknown.
    """

    num_samples: int
    content_fingerprint: str

    @property
    def tokenizer_sha256(self) -> str: ...

    @property
    def tokenizer_folder(self) -> Path | None:
        """The tokenizer's folder, which checkpoints copy; None if the tokenizer is unknown."""

    def describe(self, samples: int = 0) -> dict[str, Any]:
        """Return sizes for a report.

        Args:
            samples: number of samples that the run reads.
        """

    def sort_by_length(self, indices: Ints) -> Ints:
        """Return the samples of a step in the order in which micro-batches take them.

        Args:
            indices: int64 [N], numbers of samples.
        """

    def source_of(self, indices: Ints) -> tuple[Ints, Ints]:
        """Return the locations of samples for `read`: two int64 arrays of `indices`' shape."""

    def read(self, sources: Ints, starts: Ints, indices: Ints, place: int) -> Batch:
        """Read samples as one batch.

        Args:
            sources, starts: results of `source_of`, int64 [B] each.
            indices: int64 [B], numbers of the samples.
            place: the batch's position in the data order.
        Raises:
            DataError: the part of a file that is read is damaged.
        """

    def batch(self, indices: Ints, place: int) -> Batch:
        """Return the samples at `indices`, int64 [B], as one batch."""
