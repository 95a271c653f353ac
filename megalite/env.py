"""The one reader of the process environment: who this rank is, and what the host offers.

`find_launch` describes this rank, whichever launcher started it (`megalite.launchers` reads the
variables). A description that is half set or contradicts itself is refused, because a rank that
guesses trains alone and says nothing.
"""

from __future__ import annotations

import glob
import importlib.util
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from megalite import launchers
from megalite.errors import CommandError
from megalite.launchers import Launch as Launch
from megalite.launchers import is_number, number

# what names one launch: Open MPI's (PMIx), MPICH's and Intel MPI's, Slurm's step, other schedulers'
_LAUNCH_KEYS = (
    ("PMIX_NAMESPACE",),
    ("PMI_JOBID",),
    # a requeued job counts its steps again from 0
    ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    ("FLUX_JOB_ID",),
    ("LSB_JOBID", "JSM_NAMESPACE_ID"),
    ("PBS_JOBID",),
)
STARTED_BY = "MEGALITE_STARTED_BY"  # in a rank of the `megalite` command: that process's id
# 32 MiB is the largest threshold that glibc allows: what is larger goes back to the system at once
_HEAP = ("tcache_count=0", "mxfast=0", "mmap_threshold=33554432", "trim_threshold=4294967296")


@dataclass(frozen=True)
class Job:
    """The scheduler's name for this run of the program; equal on all its ranks."""

    id: str  # "" outside a scheduler
    restart_count: int


def find_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Return rank and world from whichever launcher started this process.

    Raises:
        LaunchError: variables half set, not numbers, out of range or contradicting each other;
            a single process where variables name several hosts or ranks.
    """
    return launchers.read_launch(env)


def find_place(env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return rank and world size of a command whose ranks exchange no messages.

    mpirun inside an allocation leaves the SLURM_ variables of its daemons to its ranks, so MPI is
    asked first; srun without PMI starts ranks that each see an MPI world of one, so it is asked
    only where mpirun speaks.

    Raises:
        LaunchError: as `find_launch`.
    """
    found = launchers.find_mpi_rank(env)
    if found is not None:
        return _ask_mpi(*found)
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
    """Return the Slurm job and how often it was requeued; an empty id outside Slurm."""
    return Job(env.get("SLURM_JOB_ID", ""), number(env, "SLURM_RESTART_COUNT", 0))


def launch_id(env: Mapping[str, str] = os.environ) -> str:
    """Return what the ranks of one mpirun or srun have in common and those of another do not."""
    for names in _LAUNCH_KEYS:
        if any(env.get(name) for name in names):
            return "/".join(env.get(name, "") for name in names)
    return ""


def first_host(env: Mapping[str, str] = os.environ) -> str:
    """Return the first host of this job, which by default runs rank 0; "" if nothing names it."""
    return launchers.first_of_job(env)


def secrets() -> list[str]:
    """Values of variables whose names say that nobody should read them.

    Many a KEY or TOKEN is no secret (GROUP_KEY=layernorm): there a plain word is none.
    """
    names = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
    word = re.compile(r"[A-Za-z_.<|>/-]+")
    return [
        value
        for name, value in os.environ.items()
        if len(value) >= 8
        and (found := names.search(name))
        and not (found[0].upper() in ("KEY", "TOKEN") and word.fullmatch(value))
    ]


def expand_user(path: str) -> str:
    """Return a path with the home folder in place of a leading `~` or `~name`, as a shell does.

    Raises:
        CommandError: `~name` is no user with a home folder here.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise CommandError(
            f"{path}: {path.split('/')[0]} is no user with a home folder here; write the whole "
            f"path, or ./{path} for a folder of that name"
        )
    return found


def variable(name: str) -> str:
    """Return a variable as the user set it, for a report; "" if it is not set."""
    return os.environ.get(name, "")


def has_agent_store() -> bool:
    """Return whether torchrun's agent keeps the ranks' meeting place, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def has_compiler() -> bool:
    """Return whether a C++ compiler is on PATH, which torch.compile needs on every device."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


def has_package(name: str) -> bool:
    """Return whether a package can be imported; a folder that is called like it is none."""
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

    The process keeps its id, arguments and open files. Without glibc nothing happens, nor within
    another program that runs a launcher (a notebook, runpy, a fork): that one would begin again.
    """
    gpus = any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd"))
    settings = heap_settings(os.environ, gpus)
    glibc = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
    started = sys.orig_argv[-len(sys.argv) :]
    # `python -m megalite ...`, of which sys.argv has the file's name
    as_module = sys.orig_argv[-len(sys.argv) - 1 :][:2] == ["-m", "megalite"]
    if settings is None or not glibc or not (started == sys.argv or as_module):
        return
    os.environ["GLIBC_TUNABLES"] = settings
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def replace(environ: Mapping[str, str]) -> None:
    """Become a process that was started with this environment."""
    os.environ.clear()
    os.environ.update(environ)


@contextmanager
def restored() -> Iterator[None]:
    """Undo the changes that a block makes to the environment, of this program or of libraries."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


def publish_launch(launch: Launch) -> None:
    """Write `launch` where torch.distributed and DeepSpeed look for it.

    DeepSpeed also compares LOCAL_RANK with Open MPI's, which names a launcher and not its rank
    where mpirun starts one torchrun a host.
    """
    os.environ.update(_to_torchrun(launch))
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(launch.local_rank)


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs that torch will use in this process, without torch.

    `CUDA_VISIBLE_DEVICES` restricts them, as CUDA reads it: the first entry that is no device ends
    the list. A torch without CUDA uses none.
    """
    with suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            return 0
    present = len(glob.glob("/dev/nvidia[0-9]*"))
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or not present:
        return present
    names = list(itertools.takewhile(_is_device, listed.replace(" ", "").split(",")))
    return len(names)


def _is_device(name: str) -> bool:
    return bool(name) and not name.startswith("-")


def rank_environment(
    rank: int, world_size: int, port: int, *, one_thread: bool = True
) -> dict[str, str]:
    """Return a copy of the environment for one of `world_size` ranks on this host.

    It has torchrun's variables. Variables of another launcher are removed.

    Args:
        one_thread: if true, a rank computes with one thread. Otherwise the variable stays as it is,
            and a rank takes its share of the cores if the variable is not set.
    """
    launch = Launch(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        master_addr="127.0.0.1",
        master_port=port,
        source="torchrun",
    )
    environ = os.environ.items()
    own = {key: value for key, value in environ if not launchers.is_launchers_own(key)}
    threads = {"OMP_NUM_THREADS": "1"} if one_thread else {}
    return own | _to_torchrun(launch) | threads


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
    if is_number(value) and int(value) > 0 and not by_torchrun:
        return int(value)
    mine = getattr(os, "sched_getaffinity", None)  # Linux: the cores this process may use
    total = os.cpu_count() or 1
    cores = len(mine(0)) if mine else total
    if launch.source == "srun" and cores < total:
        return cores  # Slurm has bound this task to cores of its own
    if launch.source not in ("torchrun", "python"):  # mpirun binds ranks, often to one core
        return max(1, min(cores, total // launch.local_world_size))
    return max(1, cores // launch.local_world_size)
