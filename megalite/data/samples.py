"""The interface of a data set to the loader: samples by their number, in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from megalite.data.batch import Batch
from megalite.data.order import Ints


class Samples(Protocol):
    """Samples of training or evaluation data, each a function of its number.

    The loader requires a step in three calls: `sort_by_length` decides which rank gets which
    samples, `source_of` returns their source, and `read` reads one micro-batch.

    Attributes:
        num_samples: samples of one epoch.
        content_fingerprint: a hash, equal for equal data, whatever the order of samples.
        tokenizer_sha256: hash of the tokenizer's file; empty if the data does not state it.
    """

    num_samples: int
    content_fingerprint: str

    @property
    def tokenizer_sha256(self) -> str: ...

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer that checkpoints keep; None if the data does not state it."""

    def describe(self, samples: int = 0) -> dict[str, Any]:
        """Return sizes for a report.

        Args:
            samples: number of samples that the run reads.
        """

    def sort_by_length(self, indices: Ints) -> Ints:
        """Return the samples of a step in the order in which ranks and micro-batches get them.

        Args:
            indices: int64 [N], numbers of samples.
        """

    def source_of(self, indices: Ints) -> tuple[Ints, Ints]:
        """Return where samples are, as two int64 arrays of the shape of `indices`, for `read`."""

    def read(self, sources: Ints, starts: Ints, indices: Ints, place: int) -> Batch:
        """Read samples as one batch.

        Args:
            sources, starts: the answer of `source_of`, int64 [B] each.
            indices: int64 [B], numbers of the samples.
            place: place of the batch in the order of the run.
        Raises:
            DataError: a file whose read part is damaged.
        """

    def batch(self, indices: Ints, place: int) -> Batch:
        """Return the samples at `indices`, int64 [B], as one batch."""
