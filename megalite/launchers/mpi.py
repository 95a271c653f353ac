"""Ranks of MPI launchers, and of launchers that describe a rank by the same four numbers.

The launchers are checked in the order of `MPI_LAUNCHERS`. If `mpirun` runs within a job of another
launcher, the variables of mpirun describe the ranks, and those of the other launcher describe
mpirun's daemons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalite.errors import LaunchError
from megalite.launchers.launch import Launch, read_int


@dataclass(frozen=True)
class MpiLauncher:
    """Variables by which a launcher describes a rank; of each tuple, the first that is set counts.

    Attributes:
        name: the name of the launcher in messages.
        rank: variables of the rank.
        size: variables of the number of ranks.
        local_rank: variables of the rank on its host.
        local_size: variables of the number of ranks on its host.
        hosts: variables of the number of hosts, for launchers without a local size.
    """

    name: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    hosts: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return self.rank + self.size + self.local_rank + self.local_size


def _comm_world(name: str, prefix: str) -> MpiLauncher:
    keys = (f"{prefix}_{key}" for key in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return MpiLauncher(name, *((key,) for key in keys))


MPI_LAUNCHERS = (
    _comm_world("Open MPI", "OMPI_COMM_WORLD"),
    _comm_world("MVAPICH2", "MV2_COMM_WORLD"),
    _comm_world("MVAPICH", "MVP_COMM_WORLD"),
    _comm_world("jsrun", "JSM_NAMESPACE"),
    MpiLauncher(
        "Flux",
        rank=("FLUX_TASK_RANK",),
        size=("FLUX_JOB_SIZE",),
        local_rank=("FLUX_TASK_LOCAL_ID",),
        local_size=(),
        hosts=("FLUX_JOB_NNODES",),
    ),
    MpiLauncher(
        "Intel MPI or MPICH",
        ("PMI_RANK", "PALS_RANKID"),
        ("PMI_SIZE", "PALS_SIZE"),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
    ),
    MpiLauncher(
        "Platform MPI",
        ("MPI_RANKID",),
        ("MPI_NRANKS",),
        ("MPI_LOCALRANKID",),
        ("MPI_LOCALNRANKS",),
    ),
)


def find_mpi(env: Mapping[str, str]) -> MpiLauncher | None:
    """Return the launcher that started this process as one of several ranks; None without one.

    `mpirun -n 1` counts as a single process without a launcher.
    """
    for mpi in MPI_LAUNCHERS:
        if _get(env, mpi.rank) and _get(env, mpi.size) and _int_of(env, mpi.size, 1) != 1:
            return mpi
    return None


def find_mpi_rank(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Return rank and size from the variables of an MPI launcher; the size may be 1."""
    for mpi in MPI_LAUNCHERS:
        if _get(env, mpi.rank) and _get(env, mpi.size):
            return _int_of(env, mpi.rank, 0), _int_of(env, mpi.size, 1)
    return None


def read_mpi(env: Mapping[str, str], mpi: MpiLauncher) -> Launch:
    """Return the launch that an MPI launcher describes.

    MASTER_ADDR and MASTER_PORT are used if they are set.

    Raises:
        LaunchError: the ranks of this host are unknown; or RANK, WORLD_SIZE, LOCAL_RANK or
            LOCAL_WORLD_SIZE are set to other numbers.
    """
    world = _int_of(env, mpi.size, 1)
    launch = Launch(
        rank=_int_of(env, mpi.rank, 0),
        world_size=world,
        local_rank=_local_rank(env, mpi),
        local_world_size=_local_size(env, mpi, world),
        master_addr=env.get("MASTER_ADDR", ""),
        master_port=read_int(env, "MASTER_PORT", 0),
        source=mpi.name,
    )
    _refuse_other_numbers(env, mpi, launch)
    if not launch.master_addr and launch.local_world_size == world:
        return Launch(**vars(launch) | {"master_addr": "127.0.0.1"})
    return launch


def _local_rank(env: Mapping[str, str], mpi: MpiLauncher) -> int:
    if _get(env, mpi.local_rank):
        return _int_of(env, mpi.local_rank, 0)
    for key in ("LOCAL_RANK", "SLURM_LOCALID"):  # srun sets rank and size of PMI, but not the local
        if env.get(key):
            return read_int(env, key, 0)
    raise LaunchError(_unknown_host(env, mpi, "LOCAL_RANK", mpi.local_rank))


def _local_size(env: Mapping[str, str], mpi: MpiLauncher, world: int) -> int:
    if _get(env, mpi.local_size):
        return _int_of(env, mpi.local_size, 1)
    if env.get("LOCAL_WORLD_SIZE"):
        return read_int(env, "LOCAL_WORLD_SIZE", 1)
    hosts = _int_of(env, (*mpi.hosts, "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES"), 0)
    if hosts and world % hosts == 0:
        return world // hosts
    raise LaunchError(_unknown_host(env, mpi, "LOCAL_WORLD_SIZE", mpi.local_size))


def _unknown_host(
    env: Mapping[str, str], mpi: MpiLauncher, variable: str, keys: tuple[str, ...]
) -> str:
    """Return the message about a missing local rank or local size."""
    rank, size = _first_set(env, mpi.rank), _first_set(env, mpi.size)
    missing = " nor ".join((*keys, variable))
    return (
        f"{rank}={env[rank]} and {size}={env[size]} ({mpi.name}) are set, but neither {missing}, "
        f"so the ranks of this host are unknown; export {variable} for every rank, or start the "
        "ranks with torchrun"
    )


def _refuse_other_numbers(env: Mapping[str, str], mpi: MpiLauncher, launch: Launch) -> None:
    expected = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.world_size,
        "LOCAL_RANK": launch.local_rank,
        "LOCAL_WORLD_SIZE": launch.local_world_size,
    }
    for key, value in expected.items():
        if read_int(env, key, value) != value:
            raise LaunchError(
                f"{key}={env[key]}, but {mpi.name} started rank {launch.rank} of "
                f"{launch.world_size} (local rank {launch.local_rank} of "
                f"{launch.local_world_size}); unset {key}"
            )


def _first_set(env: Mapping[str, str], keys: tuple[str, ...]) -> str:
    return next((key for key in keys if env.get(key)), "")


def _get(env: Mapping[str, str], keys: tuple[str, ...]) -> str:
    return env.get(_first_set(env, keys), "")


def _int_of(env: Mapping[str, str], keys: tuple[str, ...], default: int) -> int:
    return read_int(env, _first_set(env, keys), default)
