"""The hosts of a job, from the lists that schedulers and MPI provide."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from megalite.errors import LaunchError

# Files with one host per line, which may occur several times and may have slots (Open MPI).
_JOB_FILES = ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "COBALT_NODEFILE")
_MPI_FILES = (  # defaults for every mpirun; they may contain hosts without a rank
    "OMPI_MCA_orte_default_hostfile",  # Open MPI 4; the MPI operator of Kubernetes sets it
    "PRTE_MCA_prte_default_hostfile",  # Open MPI 5
)
_LOGIN = re.compile(r"(batch|login)\d*(\.|$)")  # hosts of jsrun's list that run no rank


def first_of_nodelist(nodelist: str) -> str:
    """Return the first host of a Slurm node list: `gpu[003-005,9],x1` is `gpu003`.

    Raises:
        LaunchError: the list does not begin with a host.
    """
    match = re.match(r"[^\[,]+(?:\[[^\]]+\][^\[,]*)*", nodelist)
    if not match:
        raise LaunchError(
            f"cannot parse the first host of the Slurm node list {nodelist!r}; set MASTER_ADDR to "
            "the host of rank 0"
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def first_of_job(env: Mapping[str, str]) -> str:
    """Return the host that by default runs rank 0; "" if the environment names no hosts."""
    nodes = env.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_of_nodelist(nodes)
    return next(iter(_hosts_in(env, _MPI_FILES) or hosts_of_job(env)), "")


def hosts_of_job(env: Mapping[str, str]) -> list[str]:
    """Return the hosts of a job of PBS or LSF, in order and without repetition."""
    words = env.get("LSB_MCPU_HOSTS", "").split()  # alternating host and slots
    return _hosts_in(env, _JOB_FILES) or _only_compute(words[::2])


def _hosts_in(env: Mapping[str, str], keys: tuple[str, ...]) -> list[str]:
    return next(filter(None, (_read_hosts(env.get(key, "")) for key in keys)), [])


def _read_hosts(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")[:1_000_000] if path else ""
    except (OSError, ValueError):
        return []  # the file may exist only on the host that started the job
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return _only_compute([words[0] for words in lines if words])


def _only_compute(hosts: list[str]) -> list[str]:
    return [host for host in dict.fromkeys(hosts) if not _LOGIN.match(host)]
