"""The grid of ranks: who shares a model (tensor parallel) and who shares a batch (data parallel).

Ranks that share a model are neighbours, because they talk most and sit on one host:
`rank = data_rank * tensor_parallel + tensor_rank`, the order of Megatron-LM.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from megalite import env
from megalite.errors import LaunchError
from megalite.mesh import Coordinate, Mesh
from megalite.parallel.rendezvous import agree_on_address, open_store

_TIMEOUT = datetime.timedelta(minutes=30)  # a first step may compile for minutes on one rank alone


@dataclass(frozen=True)
class Grid:
    """This rank's place and the groups it belongs to.

    `cpu_group` holds all ranks over gloo: small agreements (counts, flags) that must wait neither
    for the device nor for the device's communicator.
    """

    rank: int
    world_size: int
    local_rank: int
    mesh: Mesh
    device: torch.device
    data_group: dist.ProcessGroup
    tensor_group: dist.ProcessGroup
    cpu_group: dist.ProcessGroup

    @cached_property
    def at(self) -> Coordinate:
        """Where this rank stands."""
        return self.mesh.at(self.rank)

    @cached_property
    def tensor_places(self) -> tuple[Coordinate, ...]:
        """Where the ranks that share this rank's model stand, in the tensor group's order."""
        return tuple(map(self.mesh.at, self.mesh.group("tensor", self.rank)))

    @property
    def data_parallel(self) -> int:
        return self.mesh.data

    @property
    def tensor_parallel(self) -> int:
        return self.mesh.tensor

    @property
    def data_rank(self) -> int:
        return self.at.data_rank

    @property
    def tensor_rank(self) -> int:
        return self.at.tensor_rank

    def agree(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduce a small CPU tensor over all ranks, in place."""
        dist.all_reduce(values, op=op, group=self.cpu_group)

    def all_ok(self, ok: bool) -> bool:
        """Whether every rank says yes; every rank must ask."""
        flag = torch.tensor([int(ok)])
        self.agree(flag, dist.ReduceOp.MIN)
        return bool(flag.item())

    def gather(self, value: object) -> list[Any]:
        """One small picklable value of every rank, on every rank, in order of ranks."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.cpu_group)
        return found

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.agree(torch.zeros(1))


def start(launch: env.Launch, *, tensor_parallel: int = 1) -> Grid:
    """Join the other ranks and form the groups.

    Raises:
        LaunchError: more ranks on this host than devices, or ranks that do not form a grid.
    """
    device = _pick_device(launch)
    if launch.world_size % tensor_parallel:
        raise LaunchError(
            f"parallel.tensor {tensor_parallel} does not divide the {launch.world_size} ranks that "
            "were started; start a multiple of it, or lower parallel.tensor"
        )
    torch.set_num_threads(env.thread_count(launch))
    launch = agree_on_address(launch)
    env.publish_launch(launch)  # torch and DeepSpeed read torchrun's variables alone
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launch.source == "python":
        store = dist.HashStore()  # type: ignore[attr-defined]  # a world of one needs no port
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_TIMEOUT)
    else:
        dist.init_process_group(
            backend,
            store=None if env.has_agent_store() else open_store(launch, _TIMEOUT),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=_TIMEOUT,
        )
    mesh = Mesh(data=launch.world_size // tensor_parallel, tensor=tensor_parallel)
    return Grid(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        mesh=mesh,
        device=device,
        data_group=_own_group(mesh.groups("zero"), launch.rank),
        tensor_group=_own_group(mesh.groups("tensor"), launch.rank),
        cpu_group=dist.new_group(backend="gloo", timeout=_TIMEOUT),
    )


def stop() -> None:
    """Leave the process group; harmless when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_group(groups: Sequence[Sequence[int]], rank: int) -> dist.ProcessGroup:
    """Form every group, as all ranks must, and return the one `rank` is in."""
    own = None
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=_TIMEOUT)
        if rank in ranks:
            own = group
    assert own is not None
    return own


def _pick_device(launch: env.Launch) -> torch.device:
    if not torch.cuda.is_available():
        env.set_default("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess, and warn of its guess
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if launch.local_rank >= count:
        raise LaunchError(
            f"local rank {launch.local_rank} wants a GPU of its own, but {count} are visible on "
            f"this host; start at most {count} ranks here, or check CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device
