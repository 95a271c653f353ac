"""Arrays of a batch from examples of different lengths.

B samples   T tokens of the longest example, rounded up
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megalite.config import RunConfig
from megalite.config.tasks import find_task
from megalite.data.batch import Arrays
from megalite.data.order import Ints
from megalite.formats.examples import ExampleSplit

_ROUND = 8  # tokens; multiples suit matrix units, and give fewer different shapes

Masks = Sequence[npt.NDArray[np.bool_]]


class Collator:
    """Maker of a batch's arrays from the examples of a fine-tuning task.

    Args:
        config: the run file, whose `finetune.task` decides the arrays.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.finetune is not None
        self._task = find_task(config.finetune.task)
        self._architecture = config.model.architecture
        self._start = config.model.decoder_start_token_id
        self._longest = config.data.sequence_length
        ranks = config.parallel.tensor if config.parallel.sequence else 1
        self._multiple = math.lcm(_ROUND, ranks)

    def collate(self, split: ExampleSplit, numbers: Ints, texts: Sequence[Ints]) -> Arrays:
        """Return the arrays of a batch.

        Args:
            numbers: int64 [B], the examples of the split.
            texts: the token ids of each example.
        """
        if self._task.has_labels:
            assert split.labels is not None
            return self._label(texts, split.labels[numbers])
        masks = [split.loss_mask(number) for number in numbers.tolist()]
        if self._task.reads_source:
            return self._source_and_target(texts, masks)
        return self._next_token(texts, masks)

    def _label(self, texts: Sequence[Ints], labels: Ints) -> Arrays:
        """Return the arrays of texts with labels.

        The decoder of an encoder-decoder gets one token, whose hidden state is classified.
        """
        ids, is_token = self.pad_batch(texts)
        arrays: Arrays = {
            "input_ids": ids,
            "lengths": is_token.sum(axis=1),
            "labels": labels,
            "loss_mask": np.ones(len(texts), np.bool_),
        }
        if self._architecture != "decoder":  # causal attention sees no padding behind a text
            arrays["attention_mask"] = is_token
        if self._architecture == "encoder_decoder":
            arrays["decoder_input_ids"] = np.full((len(texts), 1), self._start, np.int64)
        return arrays

    def _next_token(self, texts: Sequence[Ints], masks: Masks) -> Arrays:
        """Return the arrays of texts whose tokens in `masks` are targets."""
        ids, _ = self.pad_batch([text[:-1] for text in texts])
        labels = np.zeros_like(ids)
        loss_mask = np.zeros(ids.shape, np.bool_)
        for row, (text, mask) in enumerate(zip(texts, masks, strict=True)):
            labels[row, : len(text) - 1] = text[1:]
            loss_mask[row, : len(text) - 1] = mask[1:]
        return {"input_ids": ids, "labels": labels, "loss_mask": loss_mask}

    def _source_and_target(self, texts: Sequence[Ints], masks: Masks) -> Arrays:
        """Return the arrays of an encoder-decoder: tokens in `masks` are targets, others source."""
        pairs = list(zip(texts, masks, strict=True))
        ids, is_token = self.pad_batch([text[~mask] for text, mask in pairs])
        labels, loss_mask = self.pad_batch([text[mask] for text, mask in pairs])
        start = np.full((len(texts), 1), self._start, np.int64)
        return {
            "input_ids": ids,
            "attention_mask": is_token,
            "decoder_input_ids": np.concatenate((start, labels[:, :-1]), axis=1),
            "labels": labels,
            "loss_mask": loss_mask,
        }

    def pad_batch(self, texts: Sequence[Ints]) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return texts padded by zeros, and whether each position is a token: [B, T] each."""
        longest = max(1, *map(len, texts))
        T = -(-longest // self._multiple) * self._multiple
        T = T if longest > self._longest else min(T, self._longest)
        ids = np.zeros((len(texts), T), np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
        return ids, np.arange(T) < np.array([len(text) for text in texts])[:, None]
