# covers: megalite/mesh.py
"""The mesh of ranks: coordinates, and groups that partition the world."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.mesh import GROUPS, Mesh


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    data, pipeline, context, tensor = (draw(st.integers(1, 3)) for _ in range(4))
    shared = data * context
    expert = draw(st.sampled_from([n for n in range(1, shared + 1) if shared % n == 0]))
    return Mesh(data=data, pipeline=pipeline, context=context, expert=expert, tensor=tensor)


@settings(deadline=None)
@given(meshes())
def test_groups_of_each_kind_partition_the_world(mesh: Mesh) -> None:
    sizes = {
        "tensor": mesh.tensor,
        "context": mesh.context,
        "zero": mesh.data * mesh.context,
        "copy": mesh.pipeline * mesh.tensor,
        "pipeline": mesh.pipeline,
        "expert": mesh.expert,
        "expert_zero": mesh.data * mesh.context // mesh.expert,
    }
    for name in GROUPS:
        groups = mesh.groups(name)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
        for group in groups:
            assert list(group) == sorted(group)
            if name in sizes:
                assert len(group) == sizes[name]


@settings(deadline=None)
@given(meshes())
def test_coordinate_is_the_index_of_a_rank_in_its_groups(mesh: Mesh) -> None:
    for rank in range(mesh.world):
        at = mesh.at(rank)
        assert at.rank == rank
        assert mesh.group("zero", rank)[at.zero_rank] == rank
        assert mesh.group("expert", rank)[at.expert_rank] == rank
        assert mesh.group("tensor", rank)[at.tensor_rank] == rank
        assert mesh.group("pipeline", rank)[at.stage] == rank
        ends = mesh.group("ends", rank)
        first_or_last = at.stage in (0, mesh.pipeline - 1)
        assert len(ends) == (min(mesh.pipeline, 2) if first_or_last else 1)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6))
def test_mesh_of_data_and_tensor_numbers_tensor_ranks_first(data: int, tensor: int) -> None:
    mesh = Mesh(data=data, tensor=tensor)
    for rank in range(mesh.world):
        assert (mesh.at(rank).data_rank, mesh.at(rank).tensor_rank) == divmod(rank, tensor)
        first = rank - rank % tensor
        assert mesh.group("tensor", rank) == tuple(range(first, first + tensor))
        assert mesh.group("zero", rank) == tuple(range(rank % tensor, mesh.world, tensor))


def test_mesh_refuses_invalid_sizes_and_ranks() -> None:
    with pytest.raises(ValueError, match="pipeline is 0"):
        Mesh(pipeline=0)
    with pytest.raises(ValueError, match="expert 3 does not divide data x context, 2 x 2"):
        Mesh(data=2, context=2, expert=3)
    with pytest.raises(ValueError, match="rank 4 is not one of the 4 ranks"):
        Mesh(data=4).at(4)
