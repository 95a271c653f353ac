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
from megalite.doctor.row import Check, Row, run
from megalite.errors import ConfigError


def examine(
    config: str | None, look: Callable[[RunConfig], str], start: Path | None = None
) -> list[Row]:
    """Return the rows of this machine, and of a run file on it.

    Args:
        look: what a preview at the examples of fine-tuning says; UserError if they are faulty.
        start: the folder of the model that the run starts from.
    """
    directory = Path()
    loaded = list[RunConfig]()
    if config is not None:
        with suppress(ConfigError):  # a row reports it
            directory = getattr(find_run(config), "parent", directory)
    folder = directory.absolute()
    while not folder.is_dir():
        folder = folder.parent

    def load() -> Row:
        assert config is not None
        loaded.append(runfile.load(config, start))
        return Row("ok", f"{loaded[0].name}: without faults")

    rows = [*run(_machine(folder))]
    if config is not None:
        rows += run([("run file", load)])
    for one in loaded:
        rows += run(_run(one, folder, look))
    return rows


def _machine(folder: Path) -> Iterator[Check]:
    """folder: on the disk that runs are written to."""
    disk = cache(lambda: host.look_disk(folder))

    def cpu() -> Row:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        cores = os.cpu_count() or 1
        return software.cpu(cores, usable or cores, env.variable("OMP_NUM_THREADS"))

    def memory() -> Row:
        from megalite.train.checks import available_memory

        return host.memory(available_memory())

    def shared_memory() -> Row:
        place = Path("/dev/shm")
        if not place.is_dir():
            return Row("ok", "not here")
        return host.shared_memory(shutil.disk_usage(place).free)

    def limits() -> Row:
        kinds = (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)
        files, locked = (resource.getrlimit(kind)[0] for kind in kinds)
        return host.limits(files, locked, infiniband=Path("/sys/class/infiniband").is_dir())

    def clock() -> Row:
        cluster = bool(env.job().id) or shutil.which("sinfo") is not None
        return host.clock(disk().skew, host.look_synchronised(), cluster=cluster)

    ranges = software.look_ranges()
    for name in ("Python", "torch", "deepspeed"):
        yield name, partial(software.look_version, name, ranges.pop(name, software.ANY))
    others = {name: partial(software.look_version, name, ranges[name]) for name in ranges}
    yield "packages", lambda: software.versions({name: look() for name, look in others.items()})
    yield "GPUs", lambda: software.gpus(software.look_cuda())
    yield "CPU", cpu
    yield "compiler", lambda: software.compiler(env.has_compiler())
    yield "MPI", software.look_mpi
    yield "Slurm", software.look_slurm
    yield "memory", memory
    yield "/dev/shm", shared_memory
    yield "limits", limits
    yield "disk", lambda: host.disk(folder, disk())
    yield "clock", clock
    yield "ports", host.look_ports


def _run(config: RunConfig, folder: Path, look: Callable[[RunConfig], str]) -> Iterator[Check]:
    yield "data", lambda: runfile.data(config, look)
    yield "plan", lambda: runfile.memory(config)
    yield "checkpoints", lambda: runfile.checkpoints(config, shutil.disk_usage(folder).free)
