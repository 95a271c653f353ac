"""Checks of memory, limits, disk, clock and ports.

`probe_*` measures this host; the other functions judge measured values.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from megalite import env
from megalite.doctor.result import GIB, CheckResult
from megalite.errors import UserError

_MIB = 1 << 20
_TEST_BYTES = 64 * _MIB  # written and read to measure a disk
_SLOW = 50e6  # bytes/s: a checkpoint of 1 GB takes 20 s
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


def _check_free(free: int, least: int, enough: int, advice: str) -> CheckResult:
    """Fail below `least` bytes, and warn below `enough`."""
    detail = f"{free / GIB:,.2f} GiB free"
    if free >= enough:
        return CheckResult("ok", detail)
    return CheckResult("warn" if free >= least else "fail", detail, advice)


def shared_memory(free: int) -> CheckResult:
    """Check /dev/shm, which NCCL uses between GPUs of a host; containers default to 64 MiB."""
    advice = "start the container with --ipc=host, or mount a larger /dev/shm"
    return _check_free(free, 32 * _MIB, GIB, advice)


def memory(free: int) -> CheckResult:
    """Check the free memory; the libraries of one rank take 1 GiB."""
    return _check_free(free, GIB, 4 * GIB, "end other processes, or request more memory")


def limits(files: int, locked: int, *, infiniband: bool) -> CheckResult:
    """Check the limits of open files and of locked memory.

    Args:
        files: number of open files; negative means no limit.
        locked: bytes of locked memory; negative means no limit.
        infiniband: whether the host has InfiniBand, which sends from locked memory.
    """
    detail = f"{files if files >= 0 else 'unlimited'} open files; "
    detail += f"{f'{locked / _MIB:,.0f} MiB' if locked >= 0 else 'unlimited'} of locked memory"
    if 0 <= files < 1024:
        advice = "run ulimit -n 65536: each rank has connections to all others"
        return CheckResult("fail" if files < 256 else "warn", detail, advice)
    if infiniband and locked >= 0:
        advice = "run ulimit -l unlimited: InfiniBand sends from locked memory"
        return CheckResult("warn", detail, advice)
    return CheckResult("ok", detail)


class Disk(NamedTuple):
    """Measured properties of a disk.

    Attributes:
        free: free bytes.
        write: bytes/s, including the sync.
        read: bytes/s, bypassing the page cache if the system allows that.
        skew: seconds by which time stamps of files are ahead of this host's clock.
    """

    free: int
    write: float
    read: float
    skew: float


def probe_disk(folder: Path) -> Disk:
    """Measure a disk with an unnamed file, which disappears even if the process is killed.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            return _measure(file, free)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}; fix that, or set logging.directory "
            "to another folder"
        ) from error


def _measure(file: IO[bytes], free: int) -> Disk:
    block = os.urandom(_MIB)
    number = file.fileno()
    start = before = time.monotonic()
    for _ in range(_TEST_BYTES // _MIB):
        before = time.time()
        file.write(block)
    file.flush()
    os.fsync(number)
    stamp = os.fstat(number).st_mtime
    after = time.time()
    written = time.monotonic()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    file.seek(0)
    while file.read(_MIB):
        pass
    read = time.monotonic()
    skew = min(0.0, stamp - before) + max(0.0, stamp - after)
    return Disk(free, _TEST_BYTES / (written - start), _TEST_BYTES / (read - written), skew)


def disk(folder: Path, measured: Disk) -> CheckResult:
    """Check the free space and the speed of the disk of runs."""
    advice = "make room, or set logging.directory to another disk"
    result = _check_free(measured.free, GIB, 20 * GIB, advice)
    write, read = measured.write / 1e6, measured.read / 1e6
    detail = f"{folder}: {result.detail}, {write:,.0f} MB/s write and sync, {read:,.0f} MB/s read"
    if result.state == "ok" and min(measured.write, measured.read) < _SLOW:
        return CheckResult("warn", detail, "use another disk, or set checkpoint.background to true")
    return result._replace(detail=detail)


def probe_time_service() -> bool | None:
    """Return whether a time service sets the kernel's clock. None means unknown."""
    with suppress(OSError, AttributeError):
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # modes 0: read only
        return None if state < 0 else bool(state != _UNSYNCHRONISED)
    return None


def clock(skew: float, synchronised: bool | None, *, cluster: bool = False) -> CheckResult:
    """Check this host's clock.

    A skew of minutes breaks authentication, that of Slurm too. A skew of seconds distorts the times
    in a run's records. A clock without a time service is harmless on a single host. In a container
    the kernel often cannot see the service.

    Args:
        skew: seconds by which time stamps of files are ahead of this host's clock.
        synchronised: whether a time service sets the kernel's clock. None means unknown.
        cluster: whether other hosts take part in runs.
    """
    service = {True: "active", False: "not detected", None: "unknown"}[synchronised]
    detail = (
        f"time stamps of files differ from this host's clock by {round(skew, 1) + 0:+.1f} s; time "
        f"service {service}"
    )
    if abs(skew) > 1:
        advice = "synchronise this host and its file server with the same time service"
        return CheckResult("fail" if abs(skew) > 60 else "warn", detail, advice)
    if synchronised is False and cluster:
        return CheckResult("warn", detail, "start a time service (chrony, ntpd) on this host")
    return CheckResult("ok", detail)


def probe_ports() -> CheckResult:
    """Check that ranks can bind ports on this host, and MASTER_PORT if it is set."""
    host = socket.gethostname()
    port = env.variable("MASTER_PORT")
    address = ""
    with suppress(OSError):
        address = str(socket.getaddrinfo(host, None)[0][4][0])
    return ports(_bind("127.0.0.1", "0"), host, address, port, _bind("", port) if port else "")


def _bind(address: str, port: str) -> str:
    """Try to bind a port and return the reason if that fails; "" if it succeeds."""
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        return "not a port number"
    try:
        socket.create_server((address, int(port))).close()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


def ports(loopback: str, host: str, address: str, port: str, master: str) -> CheckResult:
    """Check the ports that ranks use to connect.

    Args:
        loopback: the reason why no port of 127.0.0.1 can be bound; "" if one can.
        host: this host's name.
        address: the address of that name; "" if it has none.
        port: MASTER_PORT; "" if it is not set.
        master: the reason why MASTER_PORT cannot be bound; "" if it can.
    """
    if loopback:
        advice = "fix the loopback interface: ranks of a host connect through it"
        return CheckResult("fail", f"no free port on 127.0.0.1: {loopback}", advice)
    if master:
        return CheckResult(
            "fail", f"MASTER_PORT {port}: {master}", "unset MASTER_PORT, or choose another"
        )
    if not address:
        advice = "add it to /etc/hosts: ranks of other hosts connect to it"
        return CheckResult("warn", f"this host's name, {host}, has no address", advice)
    master_port = f"; MASTER_PORT {port} is free" if port else ""
    return CheckResult("ok", f"free ports are available; {host} is {address}{master_port}")
