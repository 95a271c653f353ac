"""Sources of canonical tensors, from which each rank reads the slices that it holds."""

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

_ROWS = 4096  # rows of the vocabulary read at a time


class TensorSource(Protocol):
    """Source of canonical tensors: a checkpoint, a model folder, or a source with changes."""

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        """Read a box of one state of a tensor into `target`, fp32 on the CPU.

        Raises:
            CheckpointError: the state is missing or cannot be read.
        """


@dataclass(frozen=True)
class StoredCheckpoint:
    """The tensors of a checkpoint folder."""

    folder: Path
    manifest: disk.CheckpointManifest

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        entry = self.manifest.tensors.get(tensor)
        if entry is None or state not in entry.states:
            raise CheckpointError(f"{self.folder} has no {state} of {tensor}")
        path = self.folder / entry.states[state].file
        try:
            disk.read_tensor(path, tensor, target.numpy(), box)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: cannot read {tensor}: {error}") from None


@dataclass(frozen=True)
class LoraMerged:
    """Weights with their LoRA adapters added: `W + scale B A` (Hu et al. 2021)."""

    source: TensorSource
    adapter: AdapterConfig

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        self.source.read(tensor, state, target, box)
        owner, _, kind = tensor.rpartition(".")
        projection = owner.rpartition(".")[2]
        if kind != "weight" or projection not in self.adapter.targets:
            return
        rows, columns = box
        rank = slice(0, self.adapter.rank)
        a = torch.empty(self.adapter.rank, columns.stop - columns.start)
        b = torch.empty(rows.stop - rows.start, self.adapter.rank)
        self.source.read(f"{owner}.lora_A", state, a, (rank, columns))
        self.source.read(f"{owner}.lora_B", state, b, (rows, rank))
        target.addmm_(b, a, alpha=self.adapter.scale)


@dataclass(frozen=True)
class GrownVocabulary:
    """Weights of a smaller vocabulary, with the mean of its rows for every further row.

    The mean depends on the stored values only, so all layouts read the same rows.

    Attributes:
        model: the model section of `source`.
    """

    source: TensorSource
    model: ModelConfig
    _means: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def read(self, tensor: str, state: str, target: Tensor, box: tuple[slice, ...]) -> None:
        old = arch.tensors(self.model)[tensor]
        rows, *rest = box
        size = old.shape[0]
        if old.split is not arch.Split.VOCABULARY or rows.stop <= size:
            self.source.read(tensor, state, target, box)
            return
        existing = max(0, size - rows.start)
        if existing:
            self.source.read(tensor, state, target[:existing], (slice(rows.start, size), *rest))
        target[existing:] = self._mean(tensor, state, old)[tuple(rest)]

    def _mean(self, tensor: str, state: str, old: arch.CanonicalTensor) -> Tensor:
        """Return the mean over the rows of a tensor: [D], or a scalar for a bias."""
        if tensor not in self._means:
            size, *rest = old.shape
            total = torch.zeros(rest, dtype=torch.float64)
            for first in range(0, size, _ROWS):
                last = min(first + _ROWS, size)
                part = torch.empty(last - first, *rest)
                inner = (slice(0, width) for width in rest)
                self.source.read(tensor, state, part, (slice(first, last), *inner))
                total += part.sum(dim=0, dtype=torch.float64)
            self._means[tensor] = (total / size).float()
        return self._means[tensor]


def merge_lora(source: TensorSource, model: ModelConfig) -> tuple[TensorSource, ModelConfig]:
    """Return the weights and model section of an equivalent model without adapters."""
    if model.adapter is None:
        return source, model
    return LoraMerged(source, model.adapter), model.model_copy(update={"adapter": None})


def read_part(
    source: TensorSource,
    row: arch.ParameterSpec,
    state: str,
    at: Coordinate = WHOLE,
    *,
    buffer: Tensor | None = None,
) -> Tensor:
    """Read a rank's part of a parameter's state: fp32, fused and padded.

    Args:
        at: the rank's coordinate.
        buffer: flat fp32 tensor on the CPU to read into, at least as large as the part.
    """
    pieces, shape = arch.pieces(row, at), arch.local_shape(row, at)
    value = torch.empty(shape) if buffer is None else buffer[: math.prod(shape)].view(shape)
    if sum(value[piece.target].numel() for piece in pieces) < value.numel():
        value.zero_()  # elements that no piece covers are vocabulary padding
    for piece in pieces:
        source.read(piece.tensor.name, state, value[piece.target], piece.source)
    return value


def load_into(
    model: nn.Module, config: ModelConfig, source: TensorSource, at: Coordinate = WHOLE
) -> None:
    """Load weights into a rank's part of a model without an engine."""
    rows = {row.name: row for row in arch.parameters(config)}
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(read_part(source, rows[name], WEIGHT, at))
