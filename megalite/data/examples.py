"""Samples for fine-tuning: examples of different lengths, batched with little padding.

An epoch is a shuffled pass through a split. Sample i of the run depends only on the split, the
seed, and i. The samples of a step are assigned to micro-batches by length, which changes no sum
over the step. A micro-batch is only as long as its longest example.

B samples
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megalite.config import RunConfig
from megalite.data.batch import Batch
from megalite.data.collate import Collator
from megalite.data.order import Ints, derive_key, permute
from megalite.data.packing import assemble, pack
from megalite.formats.examples import (
    ExamplesManifest,
    ExampleSplit,
    examples_fingerprint,
    open_split,
)


class ExampleSet:
    """The samples of one split of tokenized examples (`Samples`).

    Args:
        folder: a folder of tokenized examples.
        split: the name of one of its splits.
        shuffle: If false, read the split in its order on disk.
    Raises:
        DataError: there is no such split, or a file was changed.
    """

    def __init__(
        self,
        folder: Path,
        manifest: ExamplesManifest,
        split: str,
        config: RunConfig,
        *,
        shuffle: bool = True,
    ) -> None:
        assert config.finetune is not None
        self.split: ExampleSplit = open_split(folder, manifest, split)
        self.manifest = manifest
        self.tokenizer_folder = folder / "tokenizer"
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.content_fingerprint = f"{examples_fingerprint(manifest)}/{split}"
        self._shuffle = shuffle
        self._seed = config.data.seed
        self._longest = config.data.sequence_length
        self._collator = Collator(config)
        self._lengths = self.split.lengths
        self._packing = None
        if config.finetune.data.packing:
            self._packing = pack(self._lengths, self._longest, longer="cut")
        self.num_samples = self._packing.windows if self._packing else len(self.split)

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest sample."""
        if self._packing:
            return self._longest
        return min(self._longest, int(self._lengths.max()))

    def describe(self, samples: int = 0) -> dict[str, Any]:
        """Return sizes for a report; see `Samples.describe`."""
        info = self.split.info
        sizes = {"examples": info.examples, "windows": self.num_samples, "tokens": info.tokens}
        padding = {"packing_padding": self._packing.padding} if self._packing else {}
        return sizes | padding | {"cut": info.cut, "epochs": samples / self.num_samples}

    def sort_by_length(self, indices: Ints) -> Ints:
        """Return samples from the shortest to the longest."""
        if self._packing:
            return indices
        return indices[np.argsort(self._lengths[self.source_of(indices)[0]], kind="stable")]

    def batch(self, indices: Ints, place: int) -> Batch:
        """Return the samples at `indices`, int64 [B], as one batch."""
        return self.read(*self.source_of(indices), indices, place)

    def source_of(self, indices: Ints) -> tuple[Ints, Ints]:
        """Return the numbers of the samples' examples or packed windows, and their epochs."""
        epoch, number = np.divmod(indices, self.num_samples)
        if self._shuffle:
            key = derive_key(self._seed, np.zeros_like(epoch), epoch)
            number = permute(number, np.full_like(epoch, self.num_samples), key)
        return number, epoch

    def read(self, sources: Ints, starts: Ints, indices: Ints, place: int) -> Batch:
        """Return the examples or packed windows `sources` as one batch."""
        del starts, indices  # an example does not depend on epoch and sample
        numbers = sources
        if self._packing:
            split = self.split
            return assemble(self._packing, numbers, split.ids, place, loss_mask=split.loss_mask)
        texts = [self.split.ids(number).astype(np.int64) for number in numbers.tolist()]
        arrays = self._collator.collate(self.split, numbers, texts)
        return Batch.of(arrays, place, sum(map(len, texts)))
