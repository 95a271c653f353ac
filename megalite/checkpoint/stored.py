"""Canonical tensors on a disk, of which a rank reads the boxes that it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from megalite import arch
from megalite.config import AdapterConfig, ModelConfig
from megalite.engine import WEIGHT
from megalite.errors import CheckpointError
from megalite.formats import checkpoint as disk
from megalite.mesh import WHOLE, Coordinate

_ROWS = 4096  # of a vocabulary read at once


class Stored(Protocol):
    """Canonical tensors on a disk, read box by box."""

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        """A box of one state of a tensor into `target`, fp32 on the CPU.

        Raises:
            CheckpointError: it is not there, or cannot be read.
        """


@dataclass(frozen=True)
class StoredCheckpoint:
    """The tensors of a checkpoint folder."""

    folder: Path
    manifest: disk.Manifest

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        entry = self.manifest.tensors.get(tensor)
        if entry is None or state not in entry.states:
            raise CheckpointError(f"{self.folder} holds no {state} of {tensor}")
        path = self.folder / entry.states[state].file
        try:
            disk.read_tensor(path, tensor, target.numpy(), box)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: cannot read {tensor}: {error}") from None


@dataclass(frozen=True)
class Merged:
    """Stored weights with what their adapters add, `W + scale B A`, as plain ones."""

    stored: Stored
    adapter: AdapterConfig

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        self.stored.read(tensor, state, target, box)
        owner, _, kind = tensor.rpartition(".")
        projection = owner.rpartition(".")[2]
        if kind != "weight" or projection not in self.adapter.targets:
            return
        own, (rows, columns) = slice(0, self.adapter.rank), box
        a = torch.empty(self.adapter.rank, columns.stop - columns.start)
        b = torch.empty(rows.stop - rows.start, self.adapter.rank)
        self.stored.read(f"{owner}.lora_A", state, a, (own, columns))
        self.stored.read(f"{owner}.lora_B", state, b, (rows, own))
        target.addmm_(b, a, alpha=self.adapter.scale)


@dataclass(frozen=True)
class Grown:
    """Stored weights of a smaller vocabulary; each row beyond it is the mean of all its rows.

    The mean is a function of the stored numbers alone, so every layout reads the same rows.

    Attributes:
        model: the section of the stored model.
    """

    stored: Stored
    model: ModelConfig
    _means: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        known, (rows, *rest) = arch.tensors(self.model)[tensor], box
        size = known.shape[0]
        if known.split is not arch.Split.VOCABULARY or rows.stop <= size:
            self.stored.read(tensor, state, target, box)
            return
        held = max(0, size - rows.start)
        if held:
            self.stored.read(tensor, state, target[:held], (slice(rows.start, size), *rest))
        target[held:] = self._mean(tensor, state, known)[tuple(rest)]

    def _mean(self, tensor: str, state: str, known: arch.CanonicalTensor) -> Tensor:
        """Return the mean over the rows of a tensor: [D], or a scalar of a bias."""
        if tensor not in self._means:
            size, *rest = known.shape
            total = torch.zeros(rest, dtype=torch.float64)
            for first in range(0, size, _ROWS):
                last = min(first + _ROWS, size)
                part = torch.empty(last - first, *rest)
                inner = (slice(0, width) for width in rest)
                self.stored.read(tensor, state, part, (slice(first, last), *inner))
                total += part.sum(dim=0, dtype=torch.float64)
            self._means[tensor] = (total / size).float()
        return self._means[tensor]


def merged(stored: Stored, model: ModelConfig) -> tuple[Stored, ModelConfig]:
    """The weights and the section of a model without adapters that does the same."""
    if model.adapter is None:
        return stored, model
    return Merged(stored, model.adapter), model.model_copy(update={"adapter": None})


def read_local(
    stored: Stored,
    row: arch.ParameterSpec,
    state: str,
    at: Coordinate = WHOLE,
    *,
    room: Tensor | None = None,
) -> Tensor:
    """One rank's part of a parameter's state: fp32, fused and padded, only its slices read.

    Args:
        room: flat fp32 memory on the CPU to read into, of that many numbers or more.
    """
    pieces, shape = arch.pieces(row, at), arch.local_shape(row, at)
    value = torch.empty(shape) if room is None else room[: math.prod(shape)].view(shape)
    if sum(value[piece.target].numel() for piece in pieces) < value.numel():
        value.zero_()  # padding of the vocabulary
    for piece in pieces:
        stored.read(piece.tensor.name, state, value[piece.target], piece.source)
    return value


def fill_model(
    model: nn.Module,
    config: ModelConfig,
    stored: Stored,
    at: Coordinate = WHOLE,
) -> None:
    """Write stored weights into a rank's part of a model, for use without an engine."""
    rows = {row.name: row for row in arch.parameters(config)}
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(read_local(stored, rows[name], WEIGHT, at))
