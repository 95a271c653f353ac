"""Samples of fine-tuning: examples of many lengths, side by side with little padding.

An epoch is a shuffled pass through a split; sample i of the run is a function of (split, seed, i).
Of a step the samples are dealt to micro-batches by length, which changes no sum over them and
leaves each micro-batch as long as its longest example alone.

B samples   T tokens of the longest, rounded up   S tokens that are read
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalite.config import RunConfig
from megalite.data.batch import Arrays, Batch
from megalite.data.order import Ints, derive_key, permute
from megalite.data.packing import assemble, pack
from megalite.formats.examples import ExamplesManifest, Split, fingerprint, open_split

_ROUND = 8  # tokens; shapes that matrix units like, and fewer of them


class ExampleSet:
    """The samples of one split, as `megalite.data.Dataset` gives those of shards.

    Args:
        folder: of tokenized examples.
        split: one of its names.
        shuffle: False reads the split in its own order, once.
    Raises:
        DataError: no such split, or files that were changed.
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
        self.split: Split = open_split(folder, manifest, split)
        self.manifest, self.tokenizer_folder = manifest, folder / "tokenizer"
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.content_fingerprint = f"{fingerprint(manifest)}/{split}"
        self._task, self._shuffle = config.finetune.task, shuffle
        self._kind, self._seed = config.model.architecture, config.data.seed
        self._start = config.model.decoder_start_token_id
        self._longest = config.data.sequence_length
        ranks = config.parallel.tensor if config.parallel.sequence else 1
        self._round = math.lcm(_ROUND, ranks)
        self._lengths = self.split.lengths
        self._packing = None
        if config.finetune.data.packing:
            self._packing = pack(self._lengths, self._longest, longer="cut")
        self.windows = self._packing.windows if self._packing else len(self.split)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sample."""
        if self._packing:
            return self._longest
        return min(self._longest, int(self._lengths.max()))

    def describe(self, samples: int = 0) -> dict[str, Any]:
        """Sizes for a report."""
        info = self.split.info
        sizes = {"examples": info.examples, "windows": self.windows, "tokens": info.tokens}
        padding = {"packing_padding": self._packing.padding} if self._packing else {}
        return sizes | padding | {"cut": info.cut, "epochs": samples / self.windows}

    def arranged(self, indices: Ints) -> Ints:
        """The samples of a step, or of an evaluation, in the order they are dealt out."""
        if self._packing:
            return indices
        return indices[np.argsort(self._lengths[self.locate(indices)[0]], kind="stable")]

    def batch(self, indices: Ints, place: int) -> Batch:
        """The samples at `indices`, int64 [B], side by side."""
        return self.read(*self.locate(indices), indices, place)

    def locate(self, indices: Ints) -> tuple[Ints, Ints]:
        """The examples, or packed windows, of samples; and their epochs."""
        epoch, number = np.divmod(indices, self.windows)
        if self._shuffle:
            key = derive_key(self._seed, np.zeros_like(epoch), epoch)
            number = permute(number, np.full_like(epoch, self.windows), key)
        return number, epoch

    def read(self, numbers: Ints, _epochs: Ints, _indices: Ints, place: int) -> Batch:
        """What `locate` found, as tensors."""
        if self._packing:
            split = self.split
            return assemble(self._packing, numbers, split.ids, place, marks=split.marks)
        texts = [self.split.ids(number).astype(np.int64) for number in numbers.tolist()]
        if self._task == "classification":
            arrays = self._classified(texts, numbers)
        else:
            marks = [self.split.marks(number) for number in numbers.tolist()]
            make = self._answered if self._task == "seq2seq" else self._continued
            arrays = make(texts, marks)
        return Batch.of(arrays, place, sum(map(len, texts)))

    def _classified(self, texts: list[Ints], numbers: Ints) -> Arrays:
        """A text and its label; an encoder_decoder writes one token, which the label is read of."""
        assert self.split.labels is not None
        ids, seen = self._side_by_side(texts)
        arrays: Arrays = {
            "input_ids": ids,
            "lengths": seen.sum(axis=1),
            "labels": self.split.labels[numbers],
            "loss_mask": np.ones(len(texts), np.bool_),
        }
        if self._kind != "decoder":  # a decoder sees what is before alone, and no padding
            arrays["attention_mask"] = seen
        if self._kind == "encoder_decoder":
            arrays["decoder_input_ids"] = np.full((len(texts), 1), self._start, np.int64)
        return arrays

    def _continued(self, texts: list[Ints], marks: list[npt.NDArray[np.bool_]]) -> Arrays:
        """Each token is to name the next; only those that are marked count."""
        ids, _ = self._side_by_side([text[:-1] for text in texts])
        labels, mask = np.zeros_like(ids), np.zeros(ids.shape, np.bool_)
        for row, (text, marked) in enumerate(zip(texts, marks, strict=True)):
            labels[row, : len(text) - 1], mask[row, : len(text) - 1] = text[1:], marked[1:]
        return {"input_ids": ids, "labels": labels, "loss_mask": mask}

    def _answered(self, texts: list[Ints], marks: list[npt.NDArray[np.bool_]]) -> Arrays:
        """What is not marked is read, what is marked is written."""
        pairs = list(zip(texts, marks, strict=True))
        ids, seen = self._side_by_side([text[~marked] for text, marked in pairs])
        labels, mask = self._side_by_side([text[marked] for text, marked in pairs])
        before = np.full((len(texts), 1), self._start, np.int64)
        return {
            "input_ids": ids,
            "attention_mask": seen,
            "decoder_input_ids": np.concatenate((before, labels[:, :-1]), axis=1),
            "labels": labels,
            "loss_mask": mask,
        }

    def _side_by_side(self, texts: list[Ints]) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Texts with zeros behind them, and which tokens are theirs: [B, T] each."""
        longest = max(1, *map(len, texts))
        T = -(-longest // self._round) * self._round
        T = T if longest > self._longest else min(T, self._longest)
        ids = np.zeros((len(texts), T), np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
        return ids, np.arange(T) < np.array([len(text) for text in texts])[:, None]
