"""The process environment, which only this module reads: this rank's launch, and the host.

`find_launch` describes this rank for every launcher; `megalite.launchers` interprets the variables.
An incomplete or contradicting description is refused, because a rank that guessed would silently
train alone.
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
from megalite.launchers import is_number, read_int

# Variables that identify one launch: of Open MPI (PMIx), MPICH and Intel MPI, a Slurm step, others.
_LAUNCH_KEYS = (
    ("PMIX_NAMESPACE",),
    ("PMI_JOBID",),
    # a requeued job counts its steps again from 0
    ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    ("FLUX_JOB_ID",),
    ("LSB_JOBID", "JSM_NAMESPACE_ID"),
    ("PBS_JOBID",),
)
STARTED_BY = "MEGALITE_STARTED_BY"  # set in ranks of the `megalite` command: its process id
# 32 MiB is the largest threshold that glibc allows; larger blocks return to the system when freed
_HEAP = ("tcache_count=0", "mxfast=0", "mmap_threshold=33554432", "trim_threshold=4294967296")


@dataclass(frozen=True)
class Job:
    """The Slurm job of this process; equal on all its ranks."""

    id: str  # "" outside Slurm
    restart_count: int


def find_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Return rank and world size as described by the launcher of this process.

    Raises:
        LaunchError: variables are incomplete, not numbers, out of range or contradict each other;
            or this is a single process, but variables name several hosts or ranks.
    """
    return launchers.read_launch(env)


def find_rank_and_size(env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return rank and world size of a command whose ranks exchange no messages.

    The variables of mpirun are read before those of Slurm, because ranks of an mpirun inside an
    allocation inherit the SLURM_ variables of its daemons. Without variables of mpirun, MPI itself
    is not queried, because ranks of an srun without PMI each see an MPI world of one.

    Raises:
        LaunchError: as `find_launch`.
    """
    from_mpi = launchers.find_mpi_rank(env)
    if from_mpi is not None:
        return _query_mpi(*from_mpi)
    launch = find_launch(env)
    return launch.rank, launch.world_size


def _query_mpi(rank: int, size: int) -> tuple[int, int]:
    """Return MPI's own rank and size, unless the size shows that the MPI library is another one."""
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
    return Job(env.get("SLURM_JOB_ID", ""), read_int(env, "SLURM_RESTART_COUNT", 0))


def launch_id(env: Mapping[str, str] = os.environ) -> str:
    """Return an id that all ranks of one mpirun or srun share, and those of another do not."""
    for names in _LAUNCH_KEYS:
        if any(env.get(name) for name in names):
            return "/".join(env.get(name, "") for name in names)
    return ""


def first_host(env: Mapping[str, str] = os.environ) -> str:
    """Return the first host of this job, which by default runs rank 0; "" if nothing names it."""
    return launchers.first_of_job(env)


def secrets() -> list[str]:
    """Return the values of variables whose names announce a secret.

    The value of a KEY or TOKEN is often none (GROUP_KEY=layernorm). There a plain word is no
    secret.
    """
    names = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
    word = re.compile(r"[A-Za-z_.<|>/-]+")
    return [
        value
        for name, value in os.environ.items()
        if len(value) >= 8
        and (ending := names.search(name))
        and not (ending[0].upper() in ("KEY", "TOKEN") and word.fullmatch(value))
    ]


def expand_user(path: str) -> str:
    """Return a path with the home folder in place of a leading `~` or `~name`, as a shell does.

    Raises:
        CommandError: `~name` is not a user with a home folder here.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise CommandError(
            f"{path}: {path.split('/')[0]} is not a user with a home folder here; write the whole "
            f"path, or ./{path} for a folder of that name"
        )
    return expanded


def variable(name: str) -> str:
    """Return a variable; "" if it is not set."""
    return os.environ.get(name, "")


def has_agent_store() -> bool:
    """Return whether torchrun's agent, and not rank 0, hosts the store that ranks connect to."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def has_compiler() -> bool:
    """Return whether a C++ compiler is on PATH, which torch.compile needs on every device."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


def has_package(name: str) -> bool:
    """Return whether a package can be imported; a mere folder of that name does not count."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def set_default(name: str, value: str) -> None:
    """Set an environment variable, for a library without another setting, unless the user did."""
    os.environ.setdefault(name, value)


def heap_settings(environ: Mapping[str, str], gpus: bool) -> str | None:
    """Return the GLIBC_TUNABLES for training on a CPU. None means that nothing must change.

    By default, glibc collects the pieces that a tensor's alignment cuts off in lists of small
    chunks, and reuses them for objects that live longer. Then freed tensors cannot merge: the heap
    of a run was measured at up to twice its live bytes, and grew for dozens of steps. The settings
    disable both lists, and keep freed memory in the process for the next step.

    Args:
        environ: the environment of this process.
        gpus: whether the host has GPUs, whose memory then contains the tensors.
    """
    tunables = environ.get("GLIBC_TUNABLES", "")
    if gpus or "glibc.malloc." in tunables:
        return None
    return ":".join(filter(None, (tunables, *(f"glibc.malloc.{name}" for name in _HEAP))))


def restart_with_heap() -> None:
    """Restart this process once with `heap_settings`, which glibc reads only at its start.

    The process keeps its id, arguments and open files. Nothing happens without glibc, or if another
    program runs the launcher (a notebook, runpy, a fork), because that program would be restarted.
    """
    gpus = any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd"))
    settings = heap_settings(os.environ, gpus)
    glibc = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
    is_script = sys.orig_argv[-len(sys.argv) :] == sys.argv
    # `python -m megalite ...`: sys.argv[0] is the path of the file
    is_module = sys.orig_argv[-len(sys.argv) - 1 :][:2] == ["-m", "megalite"]
    if settings is None or not glibc or not (is_script or is_module):
        return
    os.environ["GLIBC_TUNABLES"] = settings
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def replace(environ: Mapping[str, str]) -> None:
    """Replace the environment of this process."""
    os.environ.clear()
    os.environ.update(environ)


@contextmanager
def restored() -> Iterator[None]:
    """Undo all changes of the environment during a block, those of libraries included."""
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
    """Set the variables that torch.distributed and DeepSpeed read.

    DeepSpeed also compares LOCAL_RANK with Open MPI's local rank. If mpirun starts one torchrun per
    host, Open MPI's variable describes torchrun itself and not its ranks, so it is replaced.
    """
    os.environ.update(_to_torchrun(launch))
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(launch.local_rank)


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs that torch will use in this process, without torch.

    `CUDA_VISIBLE_DEVICES` restricts them. As in CUDA, its first invalid entry ends the list. A
    torch without CUDA uses none.
    """
    with suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            return 0
    present = len(glob.glob("/dev/nvidia[0-9]*"))
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or not present:
        return present
    devices = listed.replace(" ", "").split(",")
    return len(list(itertools.takewhile(lambda name: _is_device(name, present), devices)))


def _is_device(name: str, present: int) -> bool:
    """Return whether an entry of CUDA_VISIBLE_DEVICES is an index below `present`, or a UUID."""
    return int(name) < present if is_number(name) else name.startswith(("GPU-", "MIG-"))


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
    inherited = {key: value for key, value in environ if not launchers.is_launcher_variable(key)}
    threads = {"OMP_NUM_THREADS": "1"} if one_thread else {}
    return inherited | _to_torchrun(launch) | threads


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
    """Return the CPU threads of this rank: OMP_NUM_THREADS, or its share of the host's cores.

    If the user did not set OMP_NUM_THREADS, torchrun sets it to 1. So 1 under torchrun is ignored.
    """
    value = os.environ.get("OMP_NUM_THREADS", "")
    by_torchrun = value == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if is_number(value) and int(value) > 0 and not by_torchrun:
        return int(value)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores this process may use
    total = os.cpu_count() or 1
    cores = len(affinity(0)) if affinity else total
    if launch.source == "srun" and cores < total:
        return cores  # Slurm bound this task to these cores, which no other task uses
    if launch.source not in ("torchrun", "python"):  # mpirun often binds each rank to one core
        return max(1, min(cores, total // launch.local_world_size))
    return max(1, cores // launch.local_world_size)
