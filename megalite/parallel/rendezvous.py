"""The rendezvous of the ranks: an address and port that all agree on, and the store there."""

from __future__ import annotations

import dataclasses
import datetime
import socket
import zlib
from contextlib import suppress
from functools import cache
from typing import Any

import torch.distributed as dist

from megalite import env
from megalite.errors import LaunchError
from megalite.log import logger

_PORT_BASE = 20000
_PORT_SPAN = 10000
_ENDPOINT_BYTES = 512  # a host name has at most 253 bytes, a port 5


def agree_on_address(launch: env.Launch) -> env.Launch:
    """Return `launch` with the address and port of rank 0 filled in, if its launcher set none.

    MPI's launchers set neither. Rank 0 then takes a free port and broadcasts it over MPI. If
    mpi4py uses another MPI library than the launcher, address and port follow from the
    environment's list of hosts and the launch id. Every rank must call this.

    Raises:
        LaunchError: the ranks are on several hosts, and nothing names the host of rank 0.
    """
    if launch.world_size == 1 or (launch.master_addr and launch.master_port):
        return launch
    address, port = _ask_mpi(launch) or _guess(launch)
    logger.info(
        "%d ranks of %s connect to %s port %d", launch.world_size, launch.source, address, port
    )
    return dataclasses.replace(launch, master_addr=address, master_port=port)


def _ask_mpi(launch: env.Launch) -> tuple[str, int] | None:
    """Return the address and port of rank 0, or None if mpi4py's MPI did not start these ranks.

    MPI is finalized at once, because a rank that ends without MPI_Finalize counts as crashed, and
    not every end of a run could call it.
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
    endpoint = bytearray(_ENDPOINT_BYTES)
    same_world = launch.world_size == MPI.COMM_WORLD.Get_size()
    if same_world:
        if MPI.COMM_WORLD.Get_rank() == 0:
            address = launch.master_addr or host_address()
            port = launch.master_port or free_port()
            text = f"{address} {port}".encode()
            endpoint[: len(text)] = text
        MPI.COMM_WORLD.Bcast(endpoint, 0)
    MPI.Finalize()
    address, _, number = endpoint.rstrip(b"\0").decode().partition(" ")
    return (address, int(number)) if same_world else None


def _guess(launch: env.Launch) -> tuple[str, int]:
    address = launch.master_addr or env.first_host()
    if not address:
        raise LaunchError(
            f"{launch.source} started {launch.world_size} ranks on several hosts, but nothing "
            "names the host of rank 0: mpi4py uses another MPI library; export MASTER_ADDR (the "
            "host of rank 0) and MASTER_PORT to all ranks, or install mpi4py for this MPI"
        )
    # the same port on all ranks of a launch, and another one for another launch
    name = f"{env.launch_id()} {launch.world_size}".encode()
    return address, launch.master_port or _PORT_BASE + zlib.crc32(name) % _PORT_SPAN


def host_address() -> str:
    """Return an address under which other hosts reach this host, or the host's name."""
    name = socket.gethostname()
    with suppress(OSError):
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return address
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
    """Return the ranks' store of this start.

    A process may start several times, and keys of an earlier start lead to groups that are gone.
    So the store counts the starts of each rank. Each start has its own keys.

    Raises:
        LaunchError: another process listens there.
    """
    store = _connect(launch, timeout)
    attempt = env.variable("TORCHELASTIC_RESTART_COUNT")
    number = store.add(f"starts_{attempt}/{launch.rank}", 1)
    return dist.PrefixStore(f"start_{attempt}_{number}", store)  # type: ignore[attr-defined]


@cache  # open until the process ends: ranks that start again meet there
def _connect(launch: env.Launch, timeout: datetime.timedelta) -> Any:
    """Return the store of all starts: torchrun's, or one that rank 0 serves.

    Rank 0 listens only at MASTER_ADDR, because PyTorch would listen on every interface. There are
    two exceptions in which PyTorch listens. The name resolves to loopback although other hosts take
    part. Or the name resolves to an address that this host does not have (NAT).

    Raises:
        LaunchError: another process listens there.
    """
    handle = None
    address = (launch.master_addr, launch.master_port)
    serves = launch.rank == 0 and not env.has_agent_store()
    if serves:
        with suppress(OSError):
            ip = socket.gethostbyname(launch.master_addr)
            if not ip.startswith("127.") or launch.local_world_size == launch.world_size:
                handle = socket.create_server((ip, launch.master_port), backlog=1024).detach()
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            *address,
            launch.world_size,
            is_master=serves,
            timeout=timeout,
            master_listen_fd=handle,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise LaunchError(
            f"MASTER_PORT {launch.master_port} of {launch.master_addr} is in use, maybe by another "
            "run; choose another port: deepspeed --master_port N, torchrun --master-port N, or "
            "export MASTER_PORT"
        ) from None
