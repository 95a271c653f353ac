"""Named axes of parallelism: the coordinates of a rank, and its groups. Pure integer arithmetic.

    rank = ((stage x data + data_rank) x context + context_rank) x tensor + tensor_rank

This is the order of Megatron-LM: ranks that communicate most have consecutive numbers, on one host.
Expert parallelism regroups the ranks and adds none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, get_args

Group = Literal["tensor", "context", "zero", "copy", "pipeline", "ends", "expert", "expert_zero"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True)
class Mesh:
    """The sizes of a run's axes.

    Attributes:
        data: number of copies of the model, each with its own samples.
        pipeline: number of stages that the layers are divided into.
        context: number of ranks that share the tokens of a sequence.
        expert: number of ranks that share the experts of a layer; it divides data x context.
        tensor: number of ranks that share each matrix.
        chunks: number of model chunks of a stage (interleaved 1F1B).

    Raises:
        ValueError: a size is below 1, or `expert` does not divide data x context.
    """

    data: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1
    chunks: int = 1

    def __post_init__(self) -> None:
        for axis in fields(self):
            size = getattr(self, axis.name)
            if size < 1:
                raise ValueError(f"{axis.name} is {size}; set it to 1 or more")
        if self.zero % self.expert:
            raise ValueError(
                f"expert {self.expert} does not divide data x context, {self.data} x {self.context}"
            )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.data * self.pipeline * self.context * self.tensor

    @property
    def zero(self) -> int:
        """Number of ranks that ZeRO partitions over."""
        return self.data * self.context

    def at(self, rank: int) -> Coordinate:
        """Return the coordinates of a rank.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not one of the {self.world} ranks")
        rest, tensor_rank = divmod(rank, self.tensor)
        rest, context_rank = divmod(rest, self.context)
        stage, data_rank = divmod(rest, self.data)
        return Coordinate(self, stage, data_rank, context_rank, tensor_rank)

    def group(self, name: Group, rank: int) -> tuple[int, ...]:
        """Return the ranks of the group that `rank` belongs to, in ascending order.

        The ranks of each kind of group:
            tensor: ranks that share each matrix.
            context: ranks that share a sequence.
            zero: ranks that ZeRO partitions over (data x context of a stage).
            copy: ranks that hold one copy of the model (stages x tensor).
            pipeline: the stages of a copy, one rank each.
            ends: the first and the last stage of a copy; a middle stage is alone.
            expert: ranks that share the experts of a layer.
            expert_zero: ranks that hold the same experts.
        """
        self.at(rank)  # raises if there is no such rank
        return next(ranks for ranks in self.groups(name) if rank in ranks)

    def groups(self, name: Group) -> list[tuple[int, ...]]:
        """Return every group of a kind. Each rank is in one of them."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            groups.setdefault(_SHARED[name](self.at(rank)), []).append(rank)
        return [tuple(ranks) for ranks in groups.values()]


@dataclass(frozen=True)
class Coordinate:
    """Position of a rank on each axis of a mesh."""

    mesh: Mesh
    stage: int = 0
    data_rank: int = 0
    context_rank: int = 0
    tensor_rank: int = 0

    @property
    def rank(self) -> int:
        """The rank with these coordinates."""
        index = self.stage * self.mesh.zero + self.zero_rank
        return index * self.mesh.tensor + self.tensor_rank

    @property
    def zero_rank(self) -> int:
        """The position among the ranks that ZeRO partitions over."""
        return self.data_rank * self.mesh.context + self.context_rank

    @property
    def expert_rank(self) -> int:
        """The position among the ranks that share a layer's experts."""
        return self.zero_rank % self.mesh.expert


WHOLE = Mesh().at(0)  # the only rank of a run without parallelism


def _ends(at: Coordinate) -> tuple[int, ...]:
    middle = 0 < at.stage < at.mesh.pipeline - 1
    return at.data_rank, at.context_rank, at.tensor_rank, at.stage if middle else -1


# Coordinates that the ranks of a group have in common.
_SHARED: dict[Group, Callable[[Coordinate], tuple[int, ...]]] = {
    "tensor": lambda at: (at.stage, at.data_rank, at.context_rank),
    "context": lambda at: (at.stage, at.data_rank, at.tensor_rank),
    "zero": lambda at: (at.stage, at.tensor_rank),
    "copy": lambda at: (at.data_rank, at.context_rank),
    "pipeline": lambda at: (at.data_rank, at.context_rank, at.tensor_rank),
    "ends": _ends,
    "expert": lambda at: (at.stage, at.tensor_rank, at.zero_rank // at.mesh.expert),
    "expert_zero": lambda at: (at.stage, at.tensor_rank, at.expert_rank),
}
