"""The meeting place of the ranks: one address and port that all know, and the store kept there."""

from __future__ import annotations

import dataclasses
import datetime
import socket
import zlib
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from megalite import env
from megalite.errors import LaunchError
from megalite.log import logger

_PORT_BASE = 20000
_PORT_SPAN = 10000
_PLACE_BYTES = 512  # a host name has at most 253, a port 5


def agree_on_address(launch: env.Launch) -> env.Launch:
    """Return `launch` with the address and port that its launcher did not give.

    MPI's launchers give neither. The ranks then ask MPI: rank 0 takes a free port and sends it to
    all. If the MPI library of this Python is not the one that started the ranks, the environment's
    list of hosts and the name of the launch decide. Every rank must call this.

    Raises:
        LaunchError: the ranks are on several hosts, and nothing names the host of rank 0.
    """
    if launch.world_size == 1 or (launch.master_addr and launch.master_port):
        return launch
    address, port = _ask_mpi(launch) or _guess(launch)
    logger.info(
        "%d ranks of %s meet at %s port %d", launch.world_size, launch.source, address, port
    )
    return dataclasses.replace(launch, master_addr=address, master_port=port)


def _ask_mpi(launch: env.Launch) -> tuple[str, int] | None:
    """Return the address and port of rank 0, or None if MPI does not know these ranks.

    MPI is left at once: a rank that ends without MPI_Finalize counts as crashed, and runs end in
    more ways than that.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    if MPI.Is_finalized():
        return None
    if not MPI.Is_initialized():
        MPI.Init()
    place = bytearray(_PLACE_BYTES)
    known = launch.world_size == MPI.COMM_WORLD.Get_size()
    if known:
        if MPI.COMM_WORLD.Get_rank() == 0:
            address = launch.master_addr or own_address()
            port = launch.master_port or free_port()
            text = f"{address} {port}".encode()
            place[: len(text)] = text
        MPI.COMM_WORLD.Bcast(place, 0)
    MPI.Finalize()
    address, _, number = place.rstrip(b"\0").decode().partition(" ")
    return (address, int(number)) if known else None


def _guess(launch: env.Launch) -> tuple[str, int]:
    address = launch.master_addr or env.first_host()
    if not address:
        raise LaunchError(
            f"{launch.source} started {launch.world_size} ranks on several hosts, and nothing says "
            "where rank 0 is: the MPI library of mpi4py is another one; export MASTER_ADDR (the "
            "host of rank 0) and MASTER_PORT to all ranks, or install mpi4py for this MPI"
        )
    # The same on all ranks, and another one for another launch.
    name = f"{env.launch_id()} {launch.world_size}".encode()
    return address, launch.master_port or _PORT_BASE + zlib.crc32(name) % _PORT_SPAN


def own_address() -> str:
    """Return an address under which other hosts reach this one, or its name."""
    name = socket.gethostname()
    with suppress(OSError):
        found = socket.gethostbyname(name)
        if not found.startswith("127."):
            return found
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel picks the interface
        return str(probe.getsockname()[0])
    return name


def free_port() -> int:
    """Return a port that no process of this host listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def open_store(launch: env.Launch, timeout: datetime.timedelta) -> Any:
    """Return the ranks' store, kept by rank 0, at MASTER_ADDR alone if that is its own address.

    PyTorch listens on every interface otherwise. So does this where a name stands for another
    address on its own host than elsewhere (loopback), or for none of this host's (behind NAT).

    Raises:
        LaunchError: another process listens there.
    """
    handle = None
    address = (launch.master_addr, launch.master_port)
    if launch.rank == 0:
        with suppress(OSError):
            found = socket.gethostbyname(launch.master_addr)
            if not found.startswith("127.") or launch.local_world_size == launch.world_size:
                handle = socket.create_server((found, launch.master_port), backlog=1024).detach()
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            *address,
            launch.world_size,
            is_master=launch.rank == 0,
            timeout=timeout,
            master_listen_fd=handle,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise LaunchError(
            f"MASTER_PORT {launch.master_port} of {launch.master_addr} is in use, maybe by another "
            "run; give this one another port: deepspeed --master_port N, torchrun --master-port N, "
            "or export MASTER_PORT"
        ) from None
