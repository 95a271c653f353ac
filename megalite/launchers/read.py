"""Read a `Launch` from the variables of torchrun, an MPI or srun, or for a single process."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megalite.errors import LaunchError
from megalite.launchers.clusters import refuse_incomplete_cluster
from megalite.launchers.hosts import first_of_nodelist
from megalite.launchers.launch import ALONE, Launch, check_range, read_int
from megalite.launchers.mpi import MpiLauncher, find_mpi, find_mpi_rank, read_mpi

_TORCH_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SHELL_STEPS = ("4294967290", "4294967291")  # slurm.h: the interactive and the batch step
_PORT_BASE, _PORT_SPAN = 20000, 10000


def read_launch(env: Mapping[str, str]) -> Launch:
    """Return the rank and its world as the launcher of this process describes them.

    Raises:
        LaunchError: variables are incomplete, not numbers, out of range or contradict each other;
            or this is a single process, but variables name several hosts or ranks.
    """
    mpi = find_mpi(env)
    launch = _find(env, mpi)
    check_range(launch)
    if launch.source == "torchrun":
        _refuse_contradiction(env, launch, mpi)
    if launch.world_size == 1:
        _refuse_idle_nodes(env)
    if launch.source == ALONE.source:
        refuse_incomplete_cluster(env)
    return launch


def _find(env: Mapping[str, str], mpi: MpiLauncher | None) -> Launch:
    present = [key for key in _TORCH_KEYS if env.get(key)]
    if len(present) == len(_TORCH_KEYS):
        return _from_torchrun(env)
    if mpi is not None and not _is_srun_task(env, mpi):
        return read_mpi(env, mpi)
    # RANK or WORLD_SIZE indicate a launcher; MASTER_ADDR alone is often set in a shell profile
    if "RANK" in present or "WORLD_SIZE" in present or "LOCAL_RANK" in present:
        _refuse_incomplete(env)
    if env.get("SLURM_PROCID") and _in_srun_step(env):
        _refuse_single_mpi(env)
        return _from_srun(env)
    if read_int(env, "SLURM_PROCID", 0) > 0:  # a shell of sbatch or salloc has 0
        raise LaunchError(
            f"SLURM_PROCID={env['SLURM_PROCID']} names one of several ranks, but this process is "
            "in no srun step; start the ranks with srun, or unset the SLURM_ variables"
        )
    return ALONE


# --- torchrun and deepspeed ------------------------------------------------------------------


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    world = read_int(env, "WORLD_SIZE", 1)
    return Launch(
        rank=read_int(env, "RANK", 0),
        world_size=world,
        local_rank=read_int(env, "LOCAL_RANK", 0),
        # deepspeed sets LOCAL_SIZE instead; without both, all ranks are on this host
        local_world_size=read_int(env, "LOCAL_WORLD_SIZE", read_int(env, "LOCAL_SIZE", world)),
        master_addr=env["MASTER_ADDR"],
        master_port=read_int(env, "MASTER_PORT", 0),
        source="torchrun",
    )


def _refuse_incomplete(env: Mapping[str, str]) -> None:
    missing = [key for key in _TORCH_KEYS if not env.get(key)]
    present = ", ".join(f"{key}={env[key]}" for key in _TORCH_KEYS if env.get(key))
    remedy = "start with deepspeed, torchrun or srun, or unset these for a single process"
    if missing == ["LOCAL_RANK"]:  # operators of Kubernetes set the other variables per pod
        remedy = (
            "start with torchrun, which sets it; if each pod runs one process, export "
            "LOCAL_RANK=0 and LOCAL_WORLD_SIZE=1"
        )
    raise LaunchError(
        f"the launch is incomplete: {present} set, but not {', '.join(missing)}; {remedy}"
    )


def _refuse_contradiction(env: Mapping[str, str], launch: Launch, mpi: MpiLauncher | None) -> None:
    """Refuse a world that is smaller than the number of tasks that were started."""
    started = {}
    if _in_srun_step(env):
        started["srun"] = read_int(env, "SLURM_NTASKS", 1)
    if mpi is not None:
        rank_and_size = find_mpi_rank(env)
        started[f"mpirun ({mpi.name})"] = rank_and_size[1] if rank_and_size else 1
    for name, tasks in started.items():
        if launch.world_size < tasks:
            raise LaunchError(
                f"WORLD_SIZE={launch.world_size} but {name} started {tasks} tasks: the same ranks "
                "would train several times; unset RANK and WORLD_SIZE, or start one launcher per "
                "node"
            )
    hosts = env.get("PET_NNODES", "").partition(":")[0]  # set for torchrun; may be a range "2:4"
    if hosts.isdigit() and int(hosts) > 1 and launch.local_world_size == launch.world_size:
        raise LaunchError(
            f"PET_NNODES={env['PET_NNODES']}, but all {launch.world_size} ranks of this launch are "
            "on one host: each host would train alone; start torchrun without --nnodes and "
            "--standalone, or unset PET_NNODES"
        )


# --- Slurm -----------------------------------------------------------------------------------


def _from_srun(env: Mapping[str, str]) -> Launch:
    missing = [key for key in ("SLURM_NTASKS", "SLURM_LOCALID") if not env.get(key)]
    if missing:
        raise LaunchError(
            f"SLURM_PROCID={env['SLURM_PROCID']} is set, but not {', '.join(missing)}; start the "
            "ranks with srun --ntasks, or unset the SLURM_ variables for a single process"
        )
    world = read_int(env, "SLURM_NTASKS", 1)
    job_id = env.get("SLURM_JOB_ID", "0")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    restart = read_int(env, "SLURM_RESTART_COUNT", 0)
    job_number = int(job_id) if job_id.isdigit() else 0
    port = _PORT_BASE + (job_number * 7 + restart) % _PORT_SPAN
    return Launch(
        rank=read_int(env, "SLURM_PROCID", 0),
        world_size=world,
        local_rank=read_int(env, "SLURM_LOCALID", 0),
        local_world_size=_tasks_here(env, world),
        master_addr=env.get("MASTER_ADDR") or first_of_nodelist(nodes),
        master_port=read_int(env, "MASTER_PORT", port),
        source="srun",
    )


def _tasks_here(env: Mapping[str, str], world: int) -> int:
    """Return the number of tasks on this node: entry SLURM_NODEID of a list such as `4(x2),3`."""
    counts: list[int] = []
    listing = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(world)
    for part in listing.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise LaunchError(
                f"cannot parse SLURM_STEP_TASKS_PER_NODE={listing!r}; start the ranks with srun"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    node = read_int(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else counts[-1]


def _in_srun_step(env: Mapping[str, str]) -> bool:
    """Return whether this process is a task of srun, and not of a shell of sbatch or salloc."""
    return env.get("SLURM_STEP_ID", "") not in ("", *_SHELL_STEPS) and bool(
        env.get("SLURM_STEP_NODELIST") or env.get("SLURM_SRUN_COMM_PORT")
    )


def _is_srun_task(env: Mapping[str, str], mpi: MpiLauncher) -> bool:
    """Return whether srun set the variables of MPI (`srun --mpi=pmi2`), for the same rank."""
    if not _in_srun_step(env) or not env.get("SLURM_LOCALID"):
        return False
    task = (read_int(env, "SLURM_PROCID", -1), read_int(env, "SLURM_NTASKS", 0))
    return task == find_mpi_rank(env) and mpi.name != "Open MPI"


def _refuse_single_mpi(env: Mapping[str, str]) -> None:
    """Refuse `srun -n4 mpirun -n1`, which starts four worlds of one rank."""
    rank_and_size = find_mpi_rank(env)
    tasks = read_int(env, "SLURM_NTASKS", 1)
    if rank_and_size == (0, 1) and tasks > 1 and env.get("OMPI_COMM_WORLD_SIZE"):
        raise LaunchError(
            f"mpirun started 1 rank within each of srun's {tasks} tasks: the same run would train "
            "several times; start the ranks with srun only, or with one mpirun"
        )


def _refuse_idle_nodes(env: Mapping[str, str]) -> None:
    nodes = read_int(env, "SLURM_JOB_NUM_NODES", 1)
    if nodes > 1:
        raise LaunchError(
            f"a world of 1 rank inside a Slurm allocation of {nodes} nodes: the other nodes would "
            "idle; start the ranks with srun, or request one node"
        )
