"""Between an engine's parameters and the canonical tensors of a checkpoint."""

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
from megalite.parallel import Grid


@dataclass(frozen=True)
class Owned:
    """A parameter, the table's row for it, and the rank that writes it and its neighbours read.

    Attributes:
        data_rank: the data-parallel rank whose group of tensor ranks gathers and reads it.
        tensor_rank: the one of them that writes it.
        held: whether the ranks of `data_rank` alone have its states, and have them whole.
    """

    parameter: nn.Parameter
    row: arch.ParameterSpec
    data_rank: int
    tensor_rank: int
    held: bool

    def is_mine(self, grid: Grid) -> bool:
        """Whether this rank writes the parameter."""
        return (self.data_rank, self.tensor_rank) == (grid.at.zero_rank, grid.at.tensor_rank)


def owned_parameters(engine: Engine, config: ModelConfig, grid: Grid) -> Iterator[Owned]:
    """Every parameter with its owner: who holds it, else bytes spread evenly over all ranks.

    The assignment is a function of the table and the layout alone, so that all agree. What the
    ranks must handle together comes first: later, each would wait there for the others' own.
    """
    loads, held = [0] * grid.world_size, list[Owned]()
    table = {row.name: row for row in arch.parameters(config)}
    for name, parameter in engine.model.named_parameters():
        row, holder = table[name], engine.holder(parameter)
        first = 0 if holder is None else holder * grid.mesh.tensor
        able = loads if holder is None else loads[first : first + grid.mesh.tensor]
        owner = first + able.index(min(able))
        loads[owner] += row.elements
        owned = Owned(parameter, row, *divmod(owner, grid.mesh.tensor), holder is not None)
        if owned.held:
            held.append(owned)
        else:
            yield owned
    yield from held


def read_canonical(engine: Engine, owned: Owned, state: str, grid: Grid) -> dict[str, Tensor]:
    """The canonical tensors of one state, whole, on the CPU of the rank that owns them.

    A collective of all ranks; empty on the others. May share memory with the engine.
    """
    mine = owned.data_rank == grid.at.zero_rank
    if owned.held:
        if not mine:
            return {}
        value = engine.read_held(owned.parameter, state)
    else:
        value = engine.read_state(owned.parameter, state)
    if not mine:
        return {}
    row, size = owned.row, grid.mesh.tensor
    parts = [value]
    if size > 1 and row.tensors[0].split is not arch.Split.REPLICATED:
        value = value.to(grid.device).contiguous()
        parts = [torch.empty_like(value) for _ in range(size)]
        dist.all_gather(parts, value, group=grid.tensor_group)
    if not owned.is_mine(grid):
        return {}
    if len(parts) == 1:  # not split: the rank's own part is the whole
        return {p.tensor.name: value[p.target].cpu().contiguous() for p in arch.pieces(row)}
    whole = {tensor.name: torch.empty(tensor.shape) for tensor in row.tensors}
    for at, part in zip(grid.tensor_places, parts, strict=True):
        for piece in arch.pieces(row, at):
            whole[piece.tensor.name][piece.source] = part[piece.target].cpu()
    return whole


def value_hash(tensor: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(tensor.detach().numpy().data).hexdigest()
