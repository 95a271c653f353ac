"""Named axes of parallelism: where a rank stands, and which ranks share what. Pure integers.

    rank = ((stage x data + data_rank) x context + context_rank) x tensor + tensor_rank

This is the order of Megatron-LM: ranks that talk most are neighbours, on one host. Experts regroup
the ranks and add none.
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
        data: copies of the model, each with its own samples.
        pipeline: stages that the layers are divided into.
        context: ranks that share the tokens of a sequence.
        expert: ranks that share the experts of a layer; it divides data x context.
        tensor: ranks that share each matrix.
        chunks: pieces of the model a stage holds (interleaved 1F1B).

    Raises:
        ValueError: a size below 1, or `expert` does not divide data x context.
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
                raise ValueError(f"{axis.name} is {size}; an axis has a size of 1 or more")
        if self.zero % self.expert:
            raise ValueError(
                f"expert {self.expert} does not divide data x context, {self.data} x {self.context}"
            )

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.data * self.pipeline * self.context * self.tensor

    @property
    def zero(self) -> int:
        """How many ranks ZeRO partitions over."""
        return self.data * self.context

    def at(self, rank: int) -> Coordinate:
        """Return where a rank stands.

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
        """Return the ranks of a group that `rank` belongs to, in ascending order.

        tensor: share each matrix. context: share a sequence. zero: ZeRO partitions over them (data
        x context of a stage). copy: hold one copy of the model (stages x tensor). pipeline: its
        stages. ends: its first and last stage; a middle stage is alone. expert: share a layer's
        experts. expert_zero: hold the same experts.
        """
        self.at(rank)  # which refuses a rank that is none
        return next(ranks for ranks in self.groups(name) if rank in ranks)

    def groups(self, name: Group) -> list[tuple[int, ...]]:
        """Return every group of a kind: each rank is in one of them."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            found.setdefault(_SAME[name](self.at(rank)), []).append(rank)
        return [tuple(ranks) for ranks in found.values()]


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
        """The rank that stands here."""
        place = self.stage * self.mesh.zero + self.zero_rank
        return place * self.mesh.tensor + self.tensor_rank

    @property
    def zero_rank(self) -> int:
        """The place among the ranks that ZeRO partitions over."""
        return self.data_rank * self.mesh.context + self.context_rank

    @property
    def expert_rank(self) -> int:
        """The place among the ranks that share a layer's experts."""
        return self.zero_rank % self.mesh.expert


WHOLE = Mesh().at(0)  # the only rank of a run without parallelism, which holds everything


def _ends(at: Coordinate) -> tuple[int, ...]:
    middle = 0 < at.stage < at.mesh.pipeline - 1
    return at.data_rank, at.context_rank, at.tensor_rank, at.stage if middle else -1


# Coordinates that the ranks of a group have in common.
_SAME: dict[Group, Callable[[Coordinate], tuple[int, ...]]] = {
    "tensor": lambda at: (at.stage, at.data_rank, at.context_rank),
    "context": lambda at: (at.stage, at.data_rank, at.tensor_rank),
    "zero": lambda at: (at.stage, at.tensor_rank),
    "copy": lambda at: (at.data_rank, at.context_rank),
    "pipeline": lambda at: (at.data_rank, at.context_rank, at.tensor_rank),
    "ends": _ends,
    "expert": lambda at: (at.stage, at.tensor_rank, at.zero_rank // at.mesh.expert),
    "expert_zero": lambda at: (at.stage, at.tensor_rank, at.expert_rank),
}
