# covers: megalite/doctor/host.py megalite/doctor/result.py megalite/doctor/software.py
"""Every check of the doctor, with facts that make it ok, a warning and a failure."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet

from megalite.doctor import CheckResult as Result
from megalite.doctor import host, print_results, result, software
from megalite.doctor.result import GIB
from megalite.doctor.software import Cuda, Gpu
from megalite.errors import DataError, UserError

RANGE = SpecifierSet(">=2.11,<2.14")
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB)
CUDA = Cuda([H100] * 8, "12.8", "13.0", "2.27.5", 8)
DISK = host.Disk(500 * GIB, 1e9, 1e9, 0.0)
RUNS, VERSION_1 = Path("runs"), Result("ok", "1")


def with_gpus(*gpus: Gpu, **changed: Any) -> Cuda:
    return Cuda(**(vars(CUDA) | {"gpus": gpus or CUDA.gpus} | changed))


Case = tuple[Callable[[], Result], str, str]
CASES: dict[str, Case] = {  # the result, its state, and a part of its text
    "a version": (lambda: software.version("torch", RANGE, "2.13.0+cpu"), "ok", "2.13.0+cpu"),
    "a newer one": (lambda: software.version("torch", RANGE, "2.14.1"), "warn", "not <2.14,>=2.11"),
    "an older one": (lambda: software.version("torch", RANGE, "2.10.0"), "fail", 'install "torch<'),
    "a missing one": (lambda: software.version("torch", RANGE, None), "fail", "missing"),
    "an old Python": (lambda: software.version("Python", RANGE, "2.7"), "fail", "a Python <2.14"),
    "packages": (
        lambda: software.versions({"a": VERSION_1, "b": Result("ok", "2")}), "ok", "a 1, b 2"
    ),
    "a newer package": (
        lambda: software.versions({"a": VERSION_1, "b": Result("warn", "9, not <9", "do")}),
        "warn",
        "b 9, not <9",
    ),
    "missing packages": (
        lambda: software.versions(
            {"a": Result("fail", "missing", "do"), "b": Result("warn", "2", "do")}
        ),
        "fail",
        "a missing, b 2",
    ),
    "not installed": (lambda: software.versions({}), "warn", "pip install -e ."),
    "no GPU": (lambda: software.gpus(Cuda()), "ok", "runs use the CPU"),
    "GPUs": (lambda: software.gpus(CUDA), "ok", "8 x NVIDIA H100 80GB HBM3, 80 GiB; torch for"),
    "torch without CUDA": (
        lambda: software.gpus(Cuda(present=4, driver="12.4")),
        "fail",
        "4 present, but torch can use none of them; torch for CUDA none, driver for 12.4",
    ),
    "a driver that is too old": (
        lambda: software.gpus(Cuda(present=1, build="13.0", driver="11.4")),
        "fail",
        "update the driver",
    ),
    "a driver older than torch": (
        lambda: software.gpus(with_gpus(build="13.0", driver="12.4")),
        "warn",
        "driver for 12.4",
    ),
    "no NCCL": (lambda: software.gpus(with_gpus(nccl=None)), "fail", "NCCL none"),
    "one GPU needs no NCCL": (lambda: software.gpus(with_gpus(H100, nccl=None)), "ok", "1 x"),
    "a V100": (
        lambda: software.gpus(with_gpus(Gpu("V100", 32 * GIB, 32 * GIB, bf16=False))),
        "warn",
        "no bf16",
    ),
    "different GPUs": (
        lambda: software.gpus(with_gpus(H100, Gpu("A100", 80 * GIB, 80 * GIB))),
        "warn",
        "1 x NVIDIA H100 80GB HBM3, 80 GiB; 1 x A100",
    ),
    "a GPU in use": (
        lambda: software.gpus(with_gpus(H100, Gpu(H100.name, 80 * GIB, 9 * GIB))),
        "warn",
        "memory is in use",
    ),
    "cores": (lambda: software.cpu(64, 16, ""), "ok", "64 cores, 16 usable; OMP_NUM_THREADS not"),
    "threads": (lambda: software.cpu(64, 16, "16"), "ok", "OMP_NUM_THREADS 16"),
    "too many threads": (lambda: software.cpu(64, 16, "32"), "warn", "1 to 16"),
    "invalid threads": (lambda: software.cpu(64, 16, "all"), "warn", "OMP_NUM_THREADS all"),
    "MPI": (lambda: software.mpi(True, "Open MPI v5, x", "/bin/mpirun"), "ok", "Open MPI v5, /bin"),
    "no mpirun": (lambda: software.mpi(True, "Open MPI v5", None), "warn", "no mpirun on PATH"),
    "no MPI": (lambda: software.mpi(False, "no libmpi.so", None), "warn", "mpi4py: no libmpi.so"),
    "no Slurm": (lambda: software.slurm(["sbatch", "srun", "sinfo"], False, ""), "ok", "not inst"),
    "Slurm": (lambda: software.slurm([], True, "debug*"), "ok", "sinfo answers"),
    "incomplete Slurm": (lambda: software.slurm(["srun"], True, ""), "warn", "srun: not on PATH"),
    "a silent Slurm": (lambda: software.slurm([], False, "no answer"), "warn", "says: no answer"),
    "a compiler": (lambda: software.compiler(True), "ok", "on PATH"),
    "no compiler": (lambda: software.compiler(False), "warn", "training.compile false"),
    "memory": (lambda: host.memory(8 * GIB), "ok", "8.00 GiB free"),
    "little memory": (lambda: host.memory(2 * GIB), "warn", "end other processes"),
    "no memory": (lambda: host.memory(GIB // 2), "fail", "0.50 GiB free"),
    "shared memory": (lambda: host.shared_memory(8 * GIB), "ok", "8.00 GiB free"),
    "a container's": (lambda: host.shared_memory(64 << 20), "warn", "--ipc=host"),
    "no shared memory": (lambda: host.shared_memory(1 << 20), "fail", "0.00 GiB free"),
    "limits": (lambda: host.limits(1024, 8 << 20, infiniband=False), "ok", "1024 open files; 8"),
    "no limits": (lambda: host.limits(-1, -1, infiniband=True), "ok", "unlimited open files"),
    "few files": (lambda: host.limits(512, -1, infiniband=False), "warn", "ulimit -n 65536"),
    "no files": (lambda: host.limits(64, -1, infiniband=False), "fail", "ulimit -n 65536"),
    "locked memory": (lambda: host.limits(4096, 8 << 20, infiniband=True), "warn", "ulimit -l"),
    "a disk": (lambda: host.disk(RUNS, DISK), "ok", "runs: 500.00 GiB free, 1,000 MB/s write"),
    "a slow disk": (lambda: host.disk(RUNS, DISK._replace(write=2e7)), "warn", "20 MB/s write"),
    "a slow read": (lambda: host.disk(RUNS, DISK._replace(read=2e7)), "warn", "20 MB/s read"),
    "a small disk": (lambda: host.disk(RUNS, DISK._replace(free=9 * GIB)), "warn", "make room"),
    "a full disk": (lambda: host.disk(RUNS, DISK._replace(free=9)), "fail", "0.00 GiB free"),
    "a clock": (lambda: host.clock(-0.004, True), "ok", "by +0.0 s; time service active"),
    "an unknown clock": (lambda: host.clock(0.0, None), "ok", "time service unknown"),
    "a clock without service": (lambda: host.clock(0.0, False), "ok", "time service not detected"),
    "a clock in a cluster": (lambda: host.clock(0.0, False, cluster=True), "warn", "chrony"),
    "a skew of seconds": (lambda: host.clock(-7.5, True), "warn", "by -7.5 s"),
    "a skew of an hour": (lambda: host.clock(3600.0, True), "fail", "by +3600.0 s"),
    "ports": (lambda: host.ports("", "n1", "10.0.0.1", "29500", ""), "ok", "n1 is 10.0.0.1; M"),
    "no address": (lambda: host.ports("", "n1", "", "", ""), "warn", "n1, has no address"),
    "a port in use": (lambda: host.ports("", "n1", "::1", "29500", "in use"), "fail", "29500: in"),
    "no loopback": (lambda: host.ports("refused", "n1", "", "", ""), "fail", "port on 127.0.0.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_check_judges_the_facts(case: str) -> None:
    check, state, words = CASES[case]
    outcome = check()
    assert (outcome.state, words in f"{outcome.detail} {outcome.advice}") == (state, True), outcome
    assert bool(outcome.advice) == (state != "ok")


def test_check_that_raises_is_a_failure() -> None:
    def unexpected() -> Result:
        raise RuntimeError("libcudart.so.12: no such file")

    def invalid() -> Result:
        raise DataError("data/train: no such folder")

    checks = [("a", unexpected), ("b", invalid), ("c", lambda: Result("ok", "fine"))]
    results = list(result.run_checks(checks))
    assert [outcome.name for outcome in results] == ["a", "b", "c"]
    assert [outcome.state for outcome in results] == ["fail", "fail", "ok"]
    message = "the check itself failed: RuntimeError: libcudart.so.12: no such file"
    assert results[0].detail == message
    assert results[1].detail == "data/train: no such folder"


def test_json_of_a_result_has_the_key_found() -> None:
    assert Result("warn", "3 GiB free", "make room", "disk").to_json() == {
        "state": "warn",
        "found": "3 GiB free",
        "advice": "make room",
        "name": "disk",
    }


def test_table_prints_brackets_literally(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(
        [Result("fail", "[rank 0] 3 < 4", "do [this]", "disk"), Result("ok", "1", "", "clock")]
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["disk", "fail", "[rank", "0]", "3", "<", "4", "do", "[this]"] in lines
    assert ["clock", "ok", "1"] in lines


# --- probes of this machine ------------------------------------------------------------------


def test_required_versions_are_those_of_the_installation() -> None:
    ranges = software.required_versions()
    assert {"Python", "torch", "deepspeed", "mpi4py", "pydantic"} <= ranges.keys()
    assert "pytest" not in ranges  # an extra
    assert software.probe_version("torch", ranges["torch"]).state == "ok"
    assert software.probe_version("no-such-package", software.ANY).state == "fail"


def test_required_versions_are_empty_without_an_installation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Any:
        raise software.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(software.importlib.metadata, "metadata", missing)
    assert software.required_versions() == {}


def test_probe_cuda_reads_the_gpus_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        mem_get_info=lambda index: (70 * GIB, 80 * GIB),
        device=Device,
        is_bf16_supported=lambda including_emulation: not including_emulation,
        get_device_name=lambda index: f"GPU {index}",
        nccl=SimpleNamespace(version=lambda: (2, 27, 5)),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    cuda = software.probe_cuda()
    assert cuda.gpus == [Gpu(f"GPU {n}", 80 * GIB, 70 * GIB) for n in (0, 1)]
    assert cuda.nccl == "2.27.5"
    monkeypatch.undo()
    assert software.probe_cuda().gpus == [] or torch.cuda.is_available()


def test_query_returns_success_and_one_line() -> None:
    python = sys.executable
    assert software.query(python, "-c", "print('one\\ntwo')") == (True, "one")
    failing = "import sys; sys.exit('first\\nlast')"
    assert software.query(python, "-c", failing) == (False, "last")
    assert software.query(python, "-c", "import os; os._exit(3)") == (False, "exit code 3")
    slow = software.query(python, "-c", "import time; time.sleep(60)", seconds=0.2)
    assert slow == (False, "no answer within 0 s")


def test_probes_of_slurm_and_mpi_run_commands_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software.probe_slurm().detail == "not installed"
    for name in ("sbatch", "srun", "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'debug*'\n")
        (tmp_path / name).chmod(0o755)
    assert software.probe_slurm() == Result("ok", "sinfo answers")
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'no controller' >&2\nexit 1\n")
    assert software.probe_slurm().detail == "sinfo says: no controller"
    monkeypatch.setattr(software, "_MPI", "raise ImportError('no libmpi')")
    assert software.probe_mpi().detail == "mpi4py: ImportError: no libmpi"


def test_probe_disk_measures_and_leaves_no_file(tmp_path: Path) -> None:
    measured = host.probe_disk(tmp_path)
    assert min(measured.free, measured.write, measured.read) > 0
    assert abs(measured.skew) < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_probe_disk_refuses_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(host.os, "fsync", refuse)
    with pytest.raises(UserError, match=f"cannot be written: {os.strerror(number)}"):
        host.probe_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_probe_disk_measures_the_skew_of_a_file_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = SimpleNamespace(time=lambda: time.time() - 3600, monotonic=time.monotonic)
    monkeypatch.setattr(host, "time", late)
    assert host.probe_disk(tmp_path).skew == pytest.approx(3600, abs=60)


def test_probe_time_service_reads_the_state_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.probe_time_service() in (True, False, None)
    for state, synchronised in ((0, True), (5, False), (-1, None)):
        library = SimpleNamespace(adjtimex=lambda _, state=state: state)
        monkeypatch.setattr(host.ctypes, "CDLL", lambda _, library=library: library)
        assert host.probe_time_service() is synchronised


def test_probe_ports_binds_the_loopback_and_master_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert host.probe_ports().state in ("ok", "warn")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert host.probe_ports().detail == f"MASTER_PORT {port}: {os.strerror(errno.EADDRINUSE)}"
    for invalid in ("port", "70000"):
        monkeypatch.setenv("MASTER_PORT", invalid)
        assert host.probe_ports().state == "fail"

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setattr(host.socket, "getaddrinfo", unknown)
    assert "has no address" in host.probe_ports().detail
