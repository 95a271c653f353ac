"""Memory, limits, disk, clock and ports. Each function judges facts; `look_*` finds them here."""

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
from megalite.doctor.row import GIB, Row
from megalite.errors import UserError

_MIB = 1 << 20
_TRIED = 64 * _MIB  # bytes written and read to know a disk
_SLOW = 50e6  # bytes/s: a checkpoint of 1 GB takes 20 s
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


def _room(free: int, least: int, enough: int, advice: str) -> Row:
    told = f"{free / GIB:,.2f} GiB free"
    if free >= enough:
        return Row("ok", told)
    return Row("warn" if free >= least else "fail", told, advice)


def shared_memory(free: int) -> Row:
    """NCCL lets the GPUs of a host talk through it; a container has 64 MiB by default."""
    advice = "start the container with --ipc=host, or mount a larger /dev/shm"
    return _room(free, 32 * _MIB, GIB, advice)


def memory(free: int) -> Row:
    """Return a row for memory: a rank's libraries alone take 1 GiB."""
    return _room(free, GIB, 4 * GIB, "end other processes, or request more memory")


def limits(files: int, locked: int, *, infiniband: bool) -> Row:
    """Open files, and bytes of locked memory; below 0: no limit."""
    told = f"{files if files >= 0 else 'any number of'} open files; "
    told += f"{f'{locked / _MIB:,.0f} MiB' if locked >= 0 else 'all'} of memory may be locked"
    if 0 <= files < 1024:
        advice = "ulimit -n 65536: ranks hold connections to each other"
        return Row("fail" if files < 256 else "warn", told, advice)
    if infiniband and locked >= 0:
        return Row("warn", told, "ulimit -l unlimited: InfiniBand sends from locked memory")
    return Row("ok", told)


class Disk(NamedTuple):
    """free: bytes. write, read: bytes/s, synced, and past the cache where the system lets us.
    skew: seconds that files are stamped ahead of this host's clock."""

    free: int
    write: float
    read: float
    skew: float


def look_disk(folder: Path) -> Disk:
    """Write to a file without a name, which disappears in any case.

    Raises:
        UserError: it cannot be written.
    """
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            return _measure(file, free)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}; fix that, or set logging.directory "
            "to a folder of yours"
        ) from error


def _measure(file: IO[bytes], free: int) -> Disk:
    block = os.urandom(_MIB)
    number = file.fileno()
    began = before = time.monotonic()
    for _ in range(_TRIED // _MIB):
        before = time.time()
        file.write(block)
    file.flush()
    os.fsync(number)
    stamp = os.fstat(number).st_mtime
    after = time.time()
    wrote = time.monotonic()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    file.seek(0)
    while file.read(_MIB):
        pass
    read = time.monotonic()
    skew = min(0.0, stamp - before) + max(0.0, stamp - after)
    return Disk(free, _TRIED / (wrote - began), _TRIED / (read - wrote), skew)


def disk(folder: Path, found: Disk) -> Row:
    row = _room(found.free, GIB, 20 * GIB, "make room, or set logging.directory to another disk")
    write, read = found.write / 1e6, found.read / 1e6
    told = f"{folder}: {row.found}, {write:,.0f} MB/s written and synced, {read:,.0f} MB/s read"
    if row.state == "ok" and min(found.write, found.read) < _SLOW:
        return Row("warn", told, "use another disk, or checkpoint.background")
    return row._replace(found=told)


def look_synchronised() -> bool | None:
    """Return what the kernel says of its clock; None: nothing."""
    with suppress(OSError, AttributeError):
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # modes 0: it is asked
        return None if state < 0 else bool(state != _UNSYNCHRONISED)
    return None


def clock(skew: float, synchronised: bool | None, *, cluster: bool = False) -> Row:
    """Judge this host's clock.

    A skew of minutes breaks logins, Slurm's too; one of seconds the times of a run's records. A
    clock that no time service sets is harmless on a host alone. In a container the kernel
    often cannot see the service at all.

    Args:
        skew: seconds that files are stamped ahead of this host's clock.
        synchronised: whether a time service sets the kernel's clock; None if it says nothing.
        cluster: whether other hosts take part in runs.
    """
    kept = {True: "runs", False: "is not seen", None: "is unknown"}[synchronised]
    told = (
        f"the disk stamps files {round(skew, 1) + 0:+.1f} s off this host's clock; a time service "
        f"{kept}"
    )
    if abs(skew) > 1:
        advice = "set this host's clock and its file server's by the same time service"
        return Row("fail" if abs(skew) > 60 else "warn", told, advice)
    if synchronised is False and cluster:
        return Row("warn", told, "start a time service (chrony, ntpd) on this host")
    return Row("ok", told)


def look_ports() -> Row:
    host = socket.gethostname()
    port = env.variable("MASTER_PORT")
    address = ""
    with suppress(OSError):
        address = str(socket.getaddrinfo(host, None)[0][4][0])
    return ports(_bind("127.0.0.1", "0"), host, address, port, _bind("", port) if port else "")


def _bind(address: str, port: str) -> str:
    """Why a port cannot be had."""
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        return "not the number of a port"
    try:
        socket.create_server((address, int(port))).close()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


def ports(loopback: str, host: str, address: str, port: str, taken: str) -> Row:
    """loopback, taken: why none can be had there, and why MASTER_PORT cannot; "" if they can."""
    if loopback:
        return Row("fail", f"none on 127.0.0.1: {loopback}", "ranks meet there: fix the loopback")
    if taken:
        return Row("fail", f"MASTER_PORT {port}: {taken}", "unset MASTER_PORT, or choose another")
    if not address:
        advice = "enter it in /etc/hosts: ranks of other hosts look for it"
        return Row("warn", f"this host's name, {host}, has no address", advice)
    named = f"; MASTER_PORT {port} is free" if port else ""
    return Row("ok", f"free ones can be had; {host} is {address}{named}")
