"""Owners of parameters: the rank that writes each one, and how it gets the canonical tensors."""

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
    """A parameter, its row of the table, and the rank that owns it.

    The owner writes the parameter when saving. When loading, the owner's copy of the model reads
    it for the others.

    Attributes:
        at: where the owner stands.
        local: whether only the owner's ZeRO rank has the states, and has them complete.
    """

    parameter: nn.Parameter
    row: arch.ParameterSpec
    at: Coordinate
    local: bool

    def is_mine(self, grid: Grid) -> bool:
        """Return whether this rank owns the parameter."""
        return self.at == grid.at

    def in_my_copy(self, grid: Grid) -> bool:
        """Return whether the owner is one of the ranks that share this rank's model."""
        return self.at.zero_rank == grid.at.zero_rank


def owned_parameters(engine: Engine, config: ModelConfig, grid: Grid) -> Iterator[ParameterOwner]:
    """Yield every parameter with its owner; parameters that all ranks handle together come first.

    A parameter whose states one ZeRO rank has belongs to that rank's copy of the model. The bytes
    of the others are spread evenly over all ranks. The assignment depends on the table and the
    layout only, so all ranks agree. A parameter that needs a collective comes before those of
    single ranks, or each rank would wait for the others' own ones.
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
        rank = min(candidates, key=elements.__getitem__)  # the first of equal ones
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
    """Return the canonical tensors of one state, complete, on the CPU of the rank that owns them.

    A collective of all ranks. The result is empty on other ranks, and may share memory with the
    engine.
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
    places = grid.tensor_places
    parts = [value]
    if len(places) > 1 and row.tensors[0].split is not arch.Split.REPLICATED:
        value = value.to(grid.device).contiguous()
        parts = [torch.empty_like(value) for _ in places]
        dist.all_gather(parts, value, group=grid.tensor_group)
    if not owner.is_mine(grid):
        return {}
    if len(parts) == 1:  # not split: this rank's part is the whole
        return {p.tensor.name: value[p.target].cpu().contiguous() for p in arch.pieces(row)}
    whole = {tensor.name: torch.empty(tensor.shape) for tensor in row.tensors}
    for at, part in zip(places, parts, strict=True):
        for piece in arch.pieces(row, at):
            whole[piece.tensor.name][piece.source] = part[piece.target].cpu()
    return whole


def value_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(tensor.detach().numpy().data).hexdigest()
