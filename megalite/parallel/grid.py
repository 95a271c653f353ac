"""Grid of ranks: a rank's coordinate on the mesh and its process groups.

Ranks that share a model are neighbours on one host, because they communicate most
(`megalite/mesh.py`). The data rank (`grid.at.data_rank` of `grid.mesh.data`) decides which samples
a rank reads. The ZeRO group may differ from the data ranks: its ranks partition optimizer states
and sum gradients.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

# imported before any group exists, because default arguments of its functions hold the group that
# exists at import
import torch.distributed.nn.functional  # noqa: F401

from megalite import env
from megalite.errors import LaunchError
from megalite.mesh import Coordinate, Mesh
from megalite.parallel.rendezvous import agree_on_address, open_store

_TIMEOUT = datetime.timedelta(minutes=30)  # in the first step one rank may compile for minutes


@dataclass(frozen=True)
class Grid:
    """This rank's coordinate and its process groups.

    Attributes:
        zero_group: ranks that ZeRO partitions over and that sum gradients.
        tensor_group: ranks that share each matrix.
        cpu_group: all ranks over gloo, for small reductions (counts, flags) that must not wait for
            the device or its communicator.
    """

    rank: int
    world_size: int
    local_rank: int
    mesh: Mesh
    device: torch.device
    zero_group: dist.ProcessGroup
    tensor_group: dist.ProcessGroup
    cpu_group: dist.ProcessGroup

    @cached_property
    def at(self) -> Coordinate:
        """Coordinate of this rank."""
        return self.mesh.at(self.rank)

    @cached_property
    def tensor_coordinates(self) -> tuple[Coordinate, ...]:
        """Coordinates of the ranks of the tensor group, in the group's order."""
        return tuple(map(self.mesh.at, self.mesh.group("tensor", self.rank)))

    def all_reduce_cpu(
        self, values: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> None:
        """Reduce a small CPU tensor over all ranks, in place."""
        dist.all_reduce(values, op=op, group=self.cpu_group)

    def sum_once(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks in place, counting ranks that share a model once; a collective.

        Args:
            values: numbers of this rank's samples, identical on ranks that share a model.
        Returns:
            `values`. A tensor on a GPU is summed there, without a synchronisation.
        """
        on_cpu = values.device.type == "cpu"
        dist.all_reduce(values, group=self.cpu_group if on_cpu else None)
        return self.count_once(values)

    def count_once(self, sums: torch.Tensor) -> torch.Tensor:
        """Divide sums over all ranks in place, so that ranks that share a model count once."""
        if sums.is_floating_point():
            return sums.div_(self.mesh.tensor)
        return sums.floor_divide_(self.mesh.tensor)

    def all_true(self, flag: bool) -> bool:
        """Return whether `flag` is true on every rank; a collective."""
        value = torch.tensor([int(flag)])
        self.all_reduce_cpu(value, dist.ReduceOp.MIN)
        return bool(value.item())

    def all_gather_objects(self, value: object) -> list[Any]:
        """Return the small picklable values of all ranks, in the order of ranks; a collective."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def gather_once(self, value: object) -> list[Any]:
        """Return one small picklable value per data rank, in order; a collective.

        The value is that of the first of the ranks that share a model.
        """
        return self.all_gather_objects(value)[:: self.mesh.tensor]

    def barrier(self) -> None:
        """Wait until every rank calls this."""
        self.all_reduce_cpu(torch.zeros(1))


def start(launch: env.Launch, *, tensor: int = 1) -> Grid:
    """Connect to the other ranks and form the groups.

    Args:
        tensor: number of ranks that share a model.
    Raises:
        LaunchError: more ranks on this host than devices, ranks that do not form a grid, or a
            process that already belongs to a process group.
    """
    if dist.is_initialized():
        raise LaunchError(
            "this process already belongs to a process group: it is training another run, or the "
            "program called torch.distributed.init_process_group; wait until that run ends, call "
            "torch.distributed.destroy_process_group(), or start this run in a separate process"
        )
    device = _pick_device(launch)
    if launch.world_size % tensor:
        raise LaunchError(
            f"parallel.tensor {tensor} does not divide the {launch.world_size} ranks that were "
            f"started; start a multiple of {tensor} ranks, or lower parallel.tensor"
        )
    torch.set_num_threads(env.thread_count(launch))
    launch = agree_on_address(launch)
    env.publish_launch(launch)  # torch and DeepSpeed read only torchrun's variables
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launch.source == "python":
        store = dist.HashStore()  # type: ignore[attr-defined]  # a world of one needs no port
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_TIMEOUT)
    else:
        dist.init_process_group(
            backend,
            store=open_store(launch, _TIMEOUT),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=_TIMEOUT,
        )
    mesh = Mesh(data=launch.world_size // tensor, tensor=tensor)
    try:
        return Grid(
            rank=launch.rank,
            world_size=launch.world_size,
            local_rank=launch.local_rank,
            mesh=mesh,
            device=device,
            zero_group=_form_groups(mesh.groups("zero"), launch.rank),
            tensor_group=_form_groups(mesh.groups("tensor"), launch.rank),
            cpu_group=dist.new_group(backend="gloo", timeout=_TIMEOUT),
        )
    except BaseException:
        stop()
        raise


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _form_groups(groups: Sequence[Sequence[int]], rank: int) -> dist.ProcessGroup:
    """Form all groups, as every rank must. Return the group of `rank`."""
    group_of_rank = None
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=_TIMEOUT)
        if rank in ranks:
            group_of_rank = group
    assert group_of_rank is not None
    return group_of_rank


def _pick_device(launch: env.Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if launch.local_rank >= count:
        raise LaunchError(
            f"local rank {launch.local_rank} needs its own GPU, but {count} are visible on this "
            f"host; start at most {count} ranks here, or check CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device
