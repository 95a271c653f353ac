"""Between an engine's parameters and the canonical tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite import shapes
from megalite.config import ModelConfig
from megalite.parallel import Grid


@dataclass(frozen=True)
class Owned:
    """A parameter, the table's row for it, and the data-parallel rank that writes and reads it."""

    parameter: nn.Parameter
    row: shapes.Parameter
    owner: int


def owned_parameters(model: nn.Module, config: ModelConfig, grid: Grid) -> Iterator[Owned]:
    """Every parameter with its owner, bytes spread evenly over the data-parallel ranks.

    The assignment is a function of the table and the number of ranks alone, so that all agree.
    """
    loads = [0] * grid.data_parallel
    table = {row.name: row for row in shapes.parameters(config)}
    for name, parameter in model.named_parameters():
        row = table[name]
        owner = loads.index(min(loads))
        loads[owner] += sum(_elements(tensor.shape) for tensor in row.tensors)
        yield Owned(parameter, row, owner)


def to_canonical(value: Tensor, row: shapes.Parameter, grid: Grid) -> dict[str, Tensor]:
    """The canonical tensors inside a parameter's value, on the CPU."""
    pieces = shapes.pieces(row, tensor_parallel=grid.tensor_parallel, tensor_rank=grid.tensor_rank)
    return {piece.tensor.name: value[piece.target].cpu().contiguous() for piece in pieces}


def from_canonical(
    tensors: dict[str, Tensor], row: shapes.Parameter, grid: Grid, device: torch.device
) -> Tensor:
    """A parameter's value, fused and padded as this rank holds it, from canonical tensors."""
    size = grid.tensor_parallel
    shape = shapes.local_shape(row, tensor_parallel=size)
    value = torch.zeros(shape, dtype=torch.float32)
    for piece in shapes.pieces(row, tensor_parallel=size, tensor_rank=grid.tensor_rank):
        value[piece.target] = tensors[piece.tensor.name][piece.source]
    return value.to(device)


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
