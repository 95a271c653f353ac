"""All checks, in the order of the table."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from megalite import env
from megalite.config import RunConfig, find_run
from megalite.doctor import host, runfile, software
from megalite.doctor.result import Check, CheckResult, run_checks
from megalite.errors import ConfigError


def examine(
    config: str | None, preview: Callable[[RunConfig], str], start: Path | None = None
) -> list[CheckResult]:
    """Check this machine, and a run file on it.

    Args:
        config: the path of the run file. None means that only the machine is checked.
        preview: describes the examples of a fine-tuning run; raises UserError if they are invalid.
        start: the folder of the model that the run starts from.
    """
    directory = Path()
    loaded = list[RunConfig]()
    if config is not None:
        with suppress(ConfigError):  # the check of the run file reports it
            directory = getattr(find_run(config), "parent", directory)
    folder = directory.absolute()
    while not folder.is_dir():
        folder = folder.parent

    def load() -> CheckResult:
        assert config is not None
        loaded.append(runfile.load_run_file(config, start))
        return CheckResult("ok", f"{loaded[0].name}: no faults")

    results = [*run_checks(_machine(folder))]
    if config is not None:
        results += run_checks([("run file", load)])
    for run_config in loaded:
        results += run_checks(_run(run_config, folder, preview))
    return results


def _machine(folder: Path) -> Iterator[Check]:
    """Yield the checks of this machine.

    Args:
        folder: a folder on the disk that runs are written to.
    """
    disk = cache(lambda: host.probe_disk(folder))

    def cpu() -> CheckResult:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        cores = os.cpu_count() or 1
        return software.cpu(cores, usable or cores, env.variable("OMP_NUM_THREADS"))

    def memory() -> CheckResult:
        from megalite.train.checks import available_memory

        return host.memory(available_memory())

    def shared_memory() -> CheckResult:
        mount = Path("/dev/shm")
        if not mount.is_dir():
            return CheckResult("ok", "not mounted")
        return host.shared_memory(shutil.disk_usage(mount).free)

    def limits() -> CheckResult:
        kinds = (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)
        files, locked = (resource.getrlimit(kind)[0] for kind in kinds)
        return host.limits(files, locked, infiniband=Path("/sys/class/infiniband").is_dir())

    def clock() -> CheckResult:
        cluster = bool(env.job().id) or shutil.which("sinfo") is not None
        return host.clock(disk().skew, host.probe_time_service(), cluster=cluster)

    ranges = software.required_versions()
    for name in ("Python", "torch", "deepspeed"):
        yield name, partial(software.probe_version, name, ranges.pop(name, software.ANY))
    others = {name: partial(software.probe_version, name, ranges[name]) for name in ranges}
    yield "packages", lambda: software.versions({name: probe() for name, probe in others.items()})
    yield "GPUs", lambda: software.gpus(software.probe_cuda())
    yield "CPU", cpu
    yield "compiler", lambda: software.compiler(env.has_compiler())
    yield "MPI", software.probe_mpi
    yield "Slurm", software.probe_slurm
    yield "memory", memory
    yield "/dev/shm", shared_memory
    yield "limits", limits
    yield "disk", lambda: host.disk(folder, disk())
    yield "clock", clock
    yield "ports", host.probe_ports


def _run(config: RunConfig, folder: Path, preview: Callable[[RunConfig], str]) -> Iterator[Check]:
    """Yield the checks of a run on this machine."""
    yield "data", lambda: runfile.data(config, preview)
    yield "plan", lambda: runfile.memory_plan(config)
    yield "checkpoints", lambda: runfile.checkpoints(config, shutil.disk_usage(folder).free)
