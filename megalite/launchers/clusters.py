"""Variables that announce several ranks or hosts, but do not state the rank of this process.

Operators of Kubernetes, clouds and schedulers set them for a launcher that they expect. If they
were ignored, every host would silently train the same run alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from megalite.errors import LaunchError
from megalite.launchers.hosts import hosts_of_job
from megalite.launchers.launch import is_number
from megalite.launchers.mpi import MPI_LAUNCHERS

# Numbers of hosts; PET_NNODES may be a range such as "2:4".
_HOST_COUNTS = (
    *("PET_NNODES", "NNODES", "NUM_NODES", "LWS_GROUP_SIZE", "SKYPILOT_NUM_NODES"),
    *("AZUREML_NODE_COUNT", "AWS_BATCH_JOB_NUM_NODES", "BEAKER_REPLICA_COUNT", "NHOSTS"),
)
# The index of this host; over 0, there are other hosts.
_HOST_RANKS = (
    *("PET_NODE_RANK", "NODE_RANK", "GROUP_RANK", "LWS_WORKER_INDEX", "SKYPILOT_NODE_RANK"),
    *("AWS_BATCH_JOB_NODE_INDEX", "BEAKER_REPLICA_RANK", "PBS_NODENUM", "PBS_VNODENUM"),
)
# Ranks of launchers that set no number of ranks.
_BARE_RANKS = ("PMIX_RANK", "ALPS_APP_PE")
_HOST_LISTS = ("SM_HOSTS",)  # JSON: a list of hosts
_CLUSTER_SPECS = ("CLUSTER_SPEC", "TF_CONFIG")  # JSON: {"cluster": {ROLE: [HOST, ...]}}

NAMES = (
    *(*_HOST_COUNTS, *_HOST_RANKS, *_BARE_RANKS, *_HOST_LISTS, *_CLUSTER_SPECS),
    *("PET_NPROC_PER_NODE", "PBS_TASKNUM", "K_MPI_JOB_ROLE"),
)


def refuse_incomplete_cluster(env: Mapping[str, str]) -> None:
    """Refuse a single process if the environment announces others.

    Raises:
        LaunchError: the variable that announces them, and the launcher to use.
    """
    _refuse_incomplete_mpi(env)
    for key in _BARE_RANKS:
        if env.get(key):
            _refuse(
                env, key, "but no variable sets the number of ranks", "use mpirun, srun or torchrun"
            )
    if _is_several(env.get("PET_NPROC_PER_NODE", "")):
        _refuse(env, "PET_NPROC_PER_NODE", "is for torchrun, and torchrun did not start this")
    _refuse_one_of_several_hosts(env)
    if env.get("PBS_TASKNUM", "1") not in ("", "0", "1"):
        _refuse(env, "PBS_TASKNUM", "names one of several tasks", "start the ranks with mpirun")
    if env.get("K_MPI_JOB_ROLE"):
        _refuse(env, "K_MPI_JOB_ROLE", "is for ranks of mpirun", "start it with mpirun")
    hosts = len(hosts_of_job(env))
    if hosts > 1:
        raise LaunchError(
            f"a world of 1 rank inside a job of {hosts} hosts: the other hosts would idle; start "
            "the ranks with mpirun, or request one host"
        )


def _refuse_incomplete_mpi(env: Mapping[str, str]) -> None:
    for mpi in MPI_LAUNCHERS:
        present = [key for key in mpi.keys if env.get(key)]
        complete = any(env.get(key) for key in mpi.rank) and any(env.get(key) for key in mpi.size)
        if present and not complete:
            missing = " and ".join(
                keys[0] for keys in (mpi.rank, mpi.size) if not any(env.get(key) for key in keys)
            )
            why = f"is set, but not {missing} ({mpi.name})"
            _refuse(env, present[0], why, "start it with mpirun")


def _refuse_one_of_several_hosts(env: Mapping[str, str]) -> None:
    for key in _HOST_COUNTS:
        if _is_several(env.get(key, "").partition(":")[0]):
            _refuse(env, key, "announces several hosts, but RANK is not set")
    for key in _HOST_RANKS:
        if env.get(key) and env[key] != "0":
            _refuse(env, key, "names one of several hosts, but RANK is not set")
    for key in (*_HOST_LISTS, *_CLUSTER_SPECS):
        hosts = _count_hosts(env.get(key, ""))
        if hosts > 1:
            _refuse(env, key, f"names {hosts} hosts, but RANK is not set")


def _refuse(
    env: Mapping[str, str], key: str, why: str, how: str = "start torchrun on every host"
) -> None:
    value = env[key] if len(env[key]) <= 60 else env[key][:57] + "..."
    raise LaunchError(
        f"the launch is incomplete: {key}={value} {why}; {how}, or unset {key} for a single process"
    )


def _is_several(text: str) -> bool:
    """Return whether a count is over 1, or a word of torchrun such as "auto" or "gpu"."""
    return text not in ("", "0", "1") and (not is_number(text) or int(text) > 1)


def _count_hosts(text: str) -> int:
    try:
        value = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return 0
    if isinstance(value, dict):  # all roles together
        roles = value.get("cluster")
        lists = roles.values() if isinstance(roles, dict) else ()
        return sum(len(hosts) for hosts in lists if isinstance(hosts, list))
    return len(value) if isinstance(value, list) else 0
