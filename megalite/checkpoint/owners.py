"""Owners of parameters: the rank that saves each one, and how it gets the canonical tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite import arch
from megalite.config import ModelConfig
from megalite.engine import Engine
from megalite.mesh import Coordinate
from megalite.parallel import Grid


@dataclass(frozen=True)
class ParameterOwner:
    """A parameter, its specification, and the rank that owns it.

    The owner writes the parameter to a checkpoint. On a load, the ranks of the owner's copy of the
    model read it and send it to the other copies.

    Attributes:
        at: the owner's coordinate.
        local: whether the owner's ZeRO rank has the complete states, and no other ZeRO rank any.
    """

    parameter: nn.Parameter
    row: arch.ParameterSpec
    at: Coordinate
    local: bool

    def is_mine(self, grid: Grid) -> bool:
        """Return whether this rank owns the parameter."""
        return self.at == grid.at

    def in_my_copy(self, grid: Grid) -> bool:
        """Return whether the owner belongs to this rank's copy of the model."""
        return self.at.zero_rank == grid.at.zero_rank


def owned_parameters(engine: Engine, config: ModelConfig, grid: Grid) -> Iterator[ParameterOwner]:
    """Yield every parameter with its owner, first those that are not local.

    The owner of a local parameter belongs to the copy of the model that has its states. All other
    parameters are spread evenly over the ranks. The assignment depends only on the model and the
    layout, so all ranks agree. Parameters that need a collective come first, because otherwise
    ranks would wait for each other's local ones.
    """
    mesh = grid.mesh
    copies = mesh.groups("copy")
    elements = [0] * mesh.world
    local = list[ParameterOwner]()
    table = {row.name: row for row in arch.parameters(config)}
    for name, parameter in engine.model.named_parameters():
        row = table[name]
        zero_rank = engine.owner_rank(parameter)
        candidates = range(mesh.world) if zero_rank is None else copies[zero_rank]
        rank = min(candidates, key=elements.__getitem__)  # the lowest rank if several are equal
        elements[rank] += row.elements
        owner = ParameterOwner(parameter, row, mesh.at(rank), local=zero_rank is not None)
        if owner.local:
            local.append(owner)
        else:
            yield owner
    yield from local


def read_canonical(
    engine: Engine, owner: ParameterOwner, state: str, grid: Grid
) -> dict[str, Tensor]:
    """Return the complete canonical tensors of a state on the owner's CPU; a collective.

    The result is empty on all other ranks. It may share memory with the engine.
    """
    mine = owner.in_my_copy(grid)
    if owner.local:
        if not mine:
            return {}
        value = engine.read_local(owner.parameter, state)
    else:
        value = engine.read_state(owner.parameter, state)
    if not mine:
        return {}
    row = owner.row
    places = grid.tensor_coordinates
    parts = [value]
    if len(places) > 1 and row.tensors[0].split is not arch.Split.REPLICATED:
        value = value.to(grid.device).contiguous()
        parts = [torch.empty_like(value) for _ in places]
        dist.all_gather(parts, value, group=grid.tensor_group)
    if not owner.is_mine(grid):
        return {}
    if len(parts) == 1:  # not split over ranks
        return {p.tensor.name: value[p.target].cpu().contiguous() for p in arch.pieces(row)}
    full = {tensor.name: torch.empty(tensor.shape) for tensor in row.tensors}
    for at, part in zip(places, parts, strict=True):
        for piece in arch.pieces(row, at):
            full[piece.tensor.name][piece.source] = part[piece.target].cpu()
    return full


def value_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(tensor.detach().numpy().data).hexdigest()
