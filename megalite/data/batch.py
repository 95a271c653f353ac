"""Batches from the loader to the engine: named tensors and the number of targets.

B samples   T tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megalite.arch import padded_targets
from megalite.data.order import Ints

Arrays = dict[str, npt.NDArray[Any]]
Count = Callable[[Mapping[str, npt.NDArray[Any]]], int]  # an objective's count of targets


@dataclass(frozen=True)
class Batch:
    """B samples as tensors.

    Attributes:
        tensors: input_ids and labels (the next tokens), int64 [B, T]; loss_mask, bool [B, T],
            whether a label is a target. If documents are masked from each other, also position_ids
            and document_ids, int64 [B, T], both from 0 in each sample. If few labels are targets,
            also target_rows, int64 [R]: the rows of [B x T] that the head computes, which are the
            targets and padding.
        place: the first sample's position in the data order.
        targets: number of targets, as the objective counts them.
        tokens: number of tokens of text, without padding.
    """

    tensors: dict[str, Tensor]
    place: int
    targets: int
    tokens: int = 0

    @classmethod
    def of(cls, arrays: Arrays, place: int, tokens: int) -> Batch:
        """Return a batch of named arrays, which include loss_mask."""
        mask = arrays["loss_mask"]
        if mask.ndim == 2 and (rows := _target_rows(mask.reshape(-1))) is not None:
            arrays = arrays | {"target_rows": rows}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return cls(tensors, place, int(np.count_nonzero(mask)), tokens)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Return the batch on a device. Copies from pinned memory are asynchronous."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin(self) -> Batch:
        """Return the batch in page-locked memory, from which GPUs copy asynchronously."""
        return self._each(lambda tensor: tensor.pin_memory())

    def with_targets(self, count: Count) -> Batch:
        """Return the batch with the number of targets by an objective's count on the CPU."""
        arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        return replace(self, targets=count(arrays))

    def first(self, samples: int) -> Batch:
        """Return a batch of the same shapes in which only the first samples have targets."""
        mask = self.tensors["loss_mask"].clone()
        mask[samples:] = False
        return replace(
            self, tensors={**self.tensors, "loss_mask": mask}, targets=int(mask.sum().item())
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, tensors={name: change(t) for name, t in self.tensors.items()})


def _target_rows(mask_R: npt.NDArray[np.bool_]) -> Ints | None:
    """Return the rows of targets, padded with a masked row; None if most rows are targets."""
    targets = np.flatnonzero(mask_R)
    if (size := padded_targets(len(mask_R), len(targets))) == len(mask_R):
        return None
    filler = np.argmin(mask_R)
    return np.concatenate((targets, np.full(size - len(targets), filler)))


@dataclass(frozen=True)
class StepBatches:
    """One rank's part of an optimizer step, with its sums of targets and tokens."""

    place: int
    micro_batches: list[Batch]
    targets: int
    tokens: int
