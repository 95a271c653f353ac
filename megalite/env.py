"""The one reader of the process environment: who this rank is, and what the host offers.

Four launchers describe a rank in three dialects:

    deepspeed, torchrun   RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    srun                  SLURM_PROCID SLURM_NTASKS SLURM_LOCALID SLURM_STEP_NODELIST
    python                nothing: a world of one

`find_launch` reads all of them into one `Launch` and refuses a description that is half set or
contradicts itself, because a rank that guesses trains alone and says nothing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from megalite.errors import LaunchError

_TORCH_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# what Open MPI's mpirun, and MPICH's and Intel MPI's, tell their ranks
_MPI_KEYS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
# what names one launch: Open MPI's (PMIx), MPICH's and Intel MPI's, Slurm's step
_LAUNCH_KEYS = (
    ("PMIX_NAMESPACE",),
    ("PMI_JOBID",),
    # a requeued job counts its steps anew
    ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
)
_SHELL_STEPS = ("4294967290", "4294967291")  # slurm.h: the interactive and the batch step
_PORT_BASE, _PORT_SPAN = 20000, 10000
# 32 MiB is the largest threshold that glibc allows: what is larger goes back to the system at once
_HEAP = ("tcache_count=0", "mxfast=0", "mmap_threshold=33554432", "trim_threshold=4294967296")


@dataclass(frozen=True)
class Launch:
    """One rank's place in the world, and where the ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int  # 0: any free port (a world of one)
    source: str  # "torchrun" (deepspeed speaks the same dialect), "srun" or "python"


@dataclass(frozen=True)
class Job:
    """The scheduler's name for this run of the program; equal on all its ranks."""

    id: str  # "" outside a scheduler
    restart_count: int


def find_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Rank and world from whichever launcher started this process.

    Raises:
        LaunchError: variables half set, not numbers, out of range or contradicting each other;
            a world of one inside a Slurm allocation of several nodes.
    """
    present = [key for key in _TORCH_KEYS if env.get(key)]
    # RANK or WORLD_SIZE announce a launcher; MASTER_ADDR alone is often left in a shell profile.
    if "RANK" in present or "WORLD_SIZE" in present or "LOCAL_RANK" in present:
        launch = _from_torchrun(env)
    elif env.get("SLURM_PROCID") and _in_srun_step(env):
        launch = _from_srun(env)
    elif _number(env, "SLURM_PROCID", 0) > 0:  # a shell of sbatch or salloc has 0
        raise LaunchError(
            f"SLURM_PROCID={env['SLURM_PROCID']} names one of several ranks, but nothing names its "
            "srun step; start the ranks with srun, or unset the SLURM_ variables"
        )
    else:
        launch = Launch(0, 1, 0, 1, "127.0.0.1", 0, "python")
    _check_range(launch)
    if launch.source == "torchrun":
        _refuse_contradiction(env, launch)
    nodes = _number(env, "SLURM_JOB_NUM_NODES", 1)
    if launch.world_size == 1 and nodes > 1:
        raise LaunchError(
            f"a world of 1 rank inside a Slurm allocation of {nodes} nodes: the other nodes would "
            "idle; start the ranks with srun, or ask for one node"
        )
    return launch


def find_place(env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Rank and world size of a command whose ranks need not talk: under mpirun, srun, or alone.

    mpirun inside an allocation leaves the SLURM_ variables of its daemons to its ranks, so MPI is
    asked first; srun without PMI starts ranks that each see an MPI world of one, so it is asked
    only where mpirun speaks.

    Raises:
        LaunchError: as `find_launch`.
    """
    for rank, size in _MPI_KEYS:
        if env.get(rank) and env.get(size):
            return _ask_mpi(_number(env, rank, 0), _number(env, size, 1))
    launch = find_launch(env)
    return launch.rank, launch.world_size


def _ask_mpi(rank: int, size: int) -> tuple[int, int]:
    """MPI's own answer, unless the library found here is not the one that started the ranks."""
    try:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        if world.Get_size() == size:
            return int(world.Get_rank()), size
    except (ImportError, RuntimeError):
        pass
    return rank, size


def job(env: Mapping[str, str] = os.environ) -> Job:
    """The Slurm job and how often it was requeued; an empty id outside Slurm."""
    return Job(env.get("SLURM_JOB_ID", ""), _number(env, "SLURM_RESTART_COUNT", 0))


def launch_id(env: Mapping[str, str] = os.environ) -> str:
    """What the ranks of one mpirun or srun have in common and those of another do not."""
    for names in _LAUNCH_KEYS:
        if any(env.get(name) for name in names):
            return "/".join(env.get(name, "") for name in names)
    return ""


def secrets() -> list[str]:
    """Values of variables whose names say that nobody should read them."""
    names = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
    return [value for name, value in os.environ.items() if names.search(name) and len(value) >= 8]


def variable(name: str) -> str:
    """A variable as the user set it, for a report; "" where it is not set."""
    return os.environ.get(name, "")


def has_agent_store() -> bool:
    """Whether torchrun's agent keeps the ranks' meeting place, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def has_compiler() -> bool:
    """Whether a C++ compiler is on PATH, which torch.compile needs on every device."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


def has_package(name: str) -> bool:
    """Whether a package can be imported; a folder that is called like it is none."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def set_default(name: str, value: str) -> None:
    """Set an environment variable for libraries that read nothing else, unless the user did."""
    os.environ.setdefault(name, value)


def heap_settings(environ: Mapping[str, str], gpus: bool) -> str | None:
    """Return the GLIBC_TUNABLES that a training process on a CPU needs; None to change nothing.

    glibc keeps the pieces that a tensor's alignment cuts off in lists of small chunks, and gives
    them to objects that live longer. Freed tensors then cannot merge: a run's heap was measured at
    up to twice its live bytes, growing for dozens of steps. Both lists are turned off. Freed
    memory stays with the process, because the next step needs it again.

    Args:
        gpus: whether the host has GPUs, which hold the tensors then.
    """
    own = environ.get("GLIBC_TUNABLES", "")
    if gpus or "glibc.malloc." in own:
        return None
    return ":".join(filter(None, (own, *(f"glibc.malloc.{name}" for name in _HEAP))))


def restart_with_heap() -> None:
    """Restart this process once with `heap_settings`, which glibc reads only at a start.

    The process keeps its id, arguments and open files. Without glibc nothing happens.
    """
    gpus = any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd"))
    settings = heap_settings(os.environ, gpus)
    if settings is None or "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return
    os.environ["GLIBC_TUNABLES"] = settings
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def replace(environ: Mapping[str, str]) -> None:
    """Become a process that was started with this environment."""
    os.environ.clear()
    os.environ.update(environ)


def publish_launch(launch: Launch) -> None:
    """Write `launch` where torch.distributed and DeepSpeed look for it."""
    os.environ.update(_to_torchrun(launch))


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """A copy of the environment in which a process is one of `world_size` ranks on this host.

    In torchrun's dialect, one thread a rank; what another launcher said of this process is left
    out.
    """
    launch = Launch(rank, world_size, rank, world_size, "127.0.0.1", port, "torchrun")
    foreign = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI")
    own = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return own | _to_torchrun(launch) | {"OMP_NUM_THREADS": "1"}


def _to_torchrun(launch: Launch) -> dict[str, str]:
    return {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_WORLD_SIZE": str(launch.local_world_size),
        "MASTER_ADDR": launch.master_addr,
        "MASTER_PORT": str(launch.master_port),
    }


def thread_count(launch: Launch) -> int:
    """CPU threads for this rank: what the user set, else its even share of the host's cores.

    torchrun sets OMP_NUM_THREADS=1 wherever the user set nothing, so its 1 is no one's wish.
    """
    value = os.environ.get("OMP_NUM_THREADS", "")
    by_torchrun = value == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if _is_number(value) and int(value) > 0 and not by_torchrun:
        return int(value)
    mine = getattr(os, "sched_getaffinity", None)  # Linux: the cores this process may use
    cores = len(mine(0)) if mine else os.cpu_count() or 1
    if launch.source == "srun" and cores < (os.cpu_count() or 1):
        return cores  # Slurm has bound this task to cores of its own
    return max(1, cores // launch.local_world_size)


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    missing = [key for key in _TORCH_KEYS if not env.get(key)]
    if missing:
        found = ", ".join(f"{key}={env[key]}" for key in _TORCH_KEYS if env.get(key))
        raise LaunchError(
            f"the launch is half set: {found}, but {', '.join(missing)} missing; "
            "start with deepspeed, torchrun or srun, or unset these for a single process"
        )
    world = _number(env, "WORLD_SIZE", 1)
    return Launch(
        rank=_number(env, "RANK", 0),
        world_size=world,
        local_rank=_number(env, "LOCAL_RANK", 0),
        # deepspeed's name for it is LOCAL_SIZE; without either it is the whole world
        local_world_size=_number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", world)),
        master_addr=env["MASTER_ADDR"],
        master_port=_number(env, "MASTER_PORT", 0),
        source="torchrun",
    )


def _from_srun(env: Mapping[str, str]) -> Launch:
    missing = [key for key in ("SLURM_NTASKS", "SLURM_LOCALID") if not env.get(key)]
    if missing:
        raise LaunchError(
            f"SLURM_PROCID={env['SLURM_PROCID']} but {', '.join(missing)} missing; start the ranks "
            "with srun --ntasks, or unset the SLURM_ variables for a single process"
        )
    world, job_id = _number(env, "SLURM_NTASKS", 1), env.get("SLURM_JOB_ID", "0")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    restart = _number(env, "SLURM_RESTART_COUNT", 0)
    number = int(job_id) if job_id.isdigit() else 0
    return Launch(
        rank=_number(env, "SLURM_PROCID", 0),
        world_size=world,
        local_rank=_number(env, "SLURM_LOCALID", 0),
        local_world_size=_tasks_here(env, world),
        master_addr=env.get("MASTER_ADDR") or first_host(nodes),
        master_port=_number(env, "MASTER_PORT", _PORT_BASE + (number * 7 + restart) % _PORT_SPAN),
        source="srun",
    )


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[003-005,9],x1` is `gpu003`."""
    match = re.match(r"[^\[,]+(?:\[[^\]]+\][^\[,]*)*", nodelist)
    if not match:
        raise LaunchError(f"cannot read the first host of the Slurm node list {nodelist!r}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def _tasks_here(env: Mapping[str, str], world: int) -> int:
    """Tasks on this node: the entry SLURM_NODEID of a list such as `4(x2),3`."""
    counts: list[int] = []
    listing = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(world)
    for part in listing.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise LaunchError(f"cannot read SLURM_STEP_TASKS_PER_NODE={listing!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else counts[-1]


def _in_srun_step(env: Mapping[str, str]) -> bool:
    """A shell of sbatch or salloc has SLURM_PROCID=0 as well, but belongs to no srun step."""
    return env.get("SLURM_STEP_ID", "") not in ("", *_SHELL_STEPS) and bool(
        env.get("SLURM_STEP_NODELIST") or env.get("SLURM_SRUN_COMM_PORT")
    )


def _refuse_contradiction(env: Mapping[str, str], launch: Launch) -> None:
    """One rank per task, yet srun and RANK/WORLD_SIZE tell different stories."""
    tasks = _number(env, "SLURM_NTASKS", 1)
    if _in_srun_step(env) and launch.world_size < tasks:
        raise LaunchError(
            f"WORLD_SIZE={launch.world_size} but srun started {tasks} tasks: the same ranks would "
            "train several times; unset RANK and WORLD_SIZE, or start one launcher a node"
        )


def _check_range(launch: Launch) -> None:
    if not 0 <= launch.rank < launch.world_size:
        raise LaunchError(
            f"rank {launch.rank} of a world of {launch.world_size}: ranks run from 0 to "
            f"{launch.world_size - 1}; check what the launcher exports"
        )
    if launch.master_port > 65535:
        raise LaunchError(f"MASTER_PORT={launch.master_port}: ports end at 65535")
    if not 0 <= launch.local_rank < launch.local_world_size <= launch.world_size:
        raise LaunchError(
            f"local rank {launch.local_rank} of {launch.local_world_size} on this host, in a world "
            f"of {launch.world_size}; check LOCAL_RANK and LOCAL_WORLD_SIZE"
        )


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdigit()  # "²" is a digit too


def _number(env: Mapping[str, str], key: str, default: int) -> int:
    value = env.get(key, "")
    if not value:
        return default
    if not _is_number(value):
        raise LaunchError(f"{key}={value!r} is not a whole number of 0 or more")
    return int(value)
