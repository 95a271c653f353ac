"""The hosts of a job, from lists that schedulers and MPI leave in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from megalite.errors import LaunchError

# Files of one host a line. A line may go on with slots (Open MPI) or hold a host several times.
_JOB_FILES = ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "COBALT_NODEFILE")
_MPI_FILES = (  # for every mpirun: a host that runs nothing now may be in it
    "OMPI_MCA_orte_default_hostfile",  # Open MPI 4; the MPI operator of Kubernetes sets it
    "PRTE_MCA_prte_default_hostfile",  # Open MPI 5
)
_LOGIN = re.compile(r"(batch|login)\d*(\.|$)")  # jsrun starts no rank on these hosts of its list


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: `gpu[003-005,9],x1` is `gpu003`.

    Raises:
        LaunchError: the list begins with no host.
    """
    match = re.match(r"[^\[,]+(?:\[[^\]]+\][^\[,]*)*", nodelist)
    if not match:
        raise LaunchError(f"cannot read the first host of the Slurm node list {nodelist!r}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def first_of_job(env: Mapping[str, str]) -> str:
    """Return the host that by default runs rank 0; "" if the environment names no hosts."""
    nodes = env.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    return next(iter(_hosts_in(env, _MPI_FILES) or hosts_of_job(env)), "")


def hosts_of_job(env: Mapping[str, str]) -> list[str]:
    """Return the hosts of a job of PBS or LSF, each once, in their order."""
    words = env.get("LSB_MCPU_HOSTS", "").split()  # host and slots in turn
    return _hosts_in(env, _JOB_FILES) or _only_compute(words[::2])


def _hosts_in(env: Mapping[str, str], keys: tuple[str, ...]) -> list[str]:
    return next(filter(None, (_read_hosts(env.get(key, "")) for key in keys)), [])


def _read_hosts(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")[:1_000_000] if path else ""
    except (OSError, ValueError):
        return []  # written for the host that started the job, and not for this one
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return _only_compute([words[0] for words in lines if words])


def _only_compute(hosts: list[str]) -> list[str]:
    return [host for host in dict.fromkeys(hosts) if not _LOGIN.match(host)]
