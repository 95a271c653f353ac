# covers: megalite/env.py
"""The launch of this process, from the variables of each launcher, and invalid descriptions."""

from __future__ import annotations

import os
from typing import Any

import pytest

from megalite import env
from megalite.env import Launch, find_launch, job, launch_id, thread_count
from megalite.errors import LaunchError, nearest
from megalite.launchers import first_of_nodelist

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"} | {
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "LOCAL_SIZE": "4",
}
# task 4 of 7 on nodes of 3, 3 and 1 tasks, as srun sets it
SRUN = {
    "SLURM_JOB_ID": "812",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_NODELIST": "gpu[03-05]",
    "SLURM_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# variables in the shell of `sbatch -N1 -n4`, before any srun
BATCH_SHELL = {
    "SLURM_JOB_ID": "812",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_JOB_NODELIST": "gpu03",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
ALONE = Launch(0, 1, 0, 1, "127.0.0.1", 0, "python")


def without(environ: dict[str, str], *keys: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key not in keys}


def test_launch_without_variables_is_a_single_process() -> None:
    assert find_launch({}) == ALONE
    assert find_launch({"PATH": "/bin", "MASTER_ADDR": "left.in.a.profile"}) == ALONE
    assert find_launch(dict.fromkeys(TORCHRUN, "")) == ALONE


def test_launch_of_torchrun_is_read() -> None:
    assert find_launch(TORCHRUN) == Launch(5, 8, 1, 4, "10.0.0.7", 29500, "torchrun")
    one_node = without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_RANK": "5"}
    assert find_launch(one_node).local_world_size == 8


def test_launch_of_deepspeed_has_the_ranks_of_its_host() -> None:
    """DeepSpeed sets LOCAL_SIZE: 4 ranks, and not all 8, share the threads and memory of a host."""
    assert find_launch(DEEPSPEED) == Launch(5, 8, 1, 4, "10.0.0.7", 29500, "torchrun")


def test_find_launch_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(key, raising=False)
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    assert find_launch().rank == 5
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert job() == env.Job("9", 3)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"])
def test_incomplete_launch_is_refused_with_the_missing_variable(missing: str) -> None:
    with pytest.raises(LaunchError, match=rf" set, but not {missing};") as caught:
        find_launch(without(TORCHRUN, missing))
    others = [key for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if key != missing]
    assert all(f"{key}={TORCHRUN[key]}" in str(caught.value) for key in others)


def test_local_rank_alone_is_an_incomplete_launch() -> None:
    with pytest.raises(LaunchError, match="incomplete: LOCAL_RANK=0 set, but not RANK"):
        find_launch({"LOCAL_RANK": "0"})


@pytest.mark.parametrize("key", [key for key in TORCHRUN if key != "MASTER_ADDR"])
@pytest.mark.parametrize("value", ["one", "-1", "1.0", " 1", "0x1", "1e1", "+1"])
def test_launch_variable_that_is_not_a_number_is_refused(key: str, value: str) -> None:
    with pytest.raises(LaunchError, match=f"{key}="):
        find_launch(TORCHRUN | {key: value})


def test_launch_variable_with_a_superscript_digit_is_refused() -> None:
    with pytest.raises(LaunchError, match="RANK='²' is not a whole number"):
        find_launch(TORCHRUN | {"RANK": "²"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "8"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"LOCAL_RANK": "4"},
        {"LOCAL_WORLD_SIZE": "9", "LOCAL_RANK": "5"},
        {"LOCAL_WORLD_SIZE": "0", "LOCAL_RANK": "0"},
    ],
)
def test_launch_out_of_range_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="rank"):
        find_launch(TORCHRUN | wrong)


def test_port_out_of_range_is_refused() -> None:
    with pytest.raises(LaunchError, match="MASTER_PORT"):
        find_launch(TORCHRUN | {"MASTER_PORT": "65536"})


def test_launch_of_srun_is_read() -> None:
    launch = find_launch(SRUN)
    assert (launch.rank, launch.world_size) == (4, 7)
    assert (launch.local_rank, launch.local_world_size) == (1, 3)
    assert (launch.master_addr, launch.source) == ("gpu03", "srun")
    assert 20000 <= launch.master_port < 30000


def test_srun_ranks_have_one_master_address() -> None:
    addresses = {
        (launch.master_addr, launch.master_port)
        for rank, (local, node) in enumerate(
            [(i, n) for n, c in enumerate((3, 3, 1)) for i in range(c)]
        )
        for launch in [
            find_launch(
                SRUN
                | {
                    "SLURM_PROCID": str(rank),
                    "SLURM_LOCALID": str(local),
                    "SLURM_NODEID": str(node),
                }
            )
        ]
    }
    assert len(addresses) == 1


def test_srun_jobs_and_restarts_have_different_ports() -> None:
    """Two jobs on a node must not share a port. A requeued job must not wait for its old port."""
    ports = {
        find_launch(
            SRUN | {"SLURM_JOB_ID": str(number), "SLURM_RESTART_COUNT": str(restart)}
        ).master_port
        for number in (812, 813, 814)
        for restart in range(3)
    }
    assert len(ports) == 9


@pytest.mark.parametrize(
    ("listing", "node", "expected"),
    [
        ("3(x2),1", "0", 3),
        ("3(x2),1", "1", 3),
        ("3(x2),1", "2", 1),
        ("4", "0", 4),
        ("1,2(x3),5", "3", 2),
        ("1,2(x3),5", "4", 5),
        ("2(x128)", "127", 2),
    ],
)
def test_local_size_is_read_from_the_list_of_tasks(listing: str, node: str, expected: int) -> None:
    changed = {"SLURM_STEP_TASKS_PER_NODE": listing, "SLURM_NODEID": node, "SLURM_LOCALID": "0"}
    assert find_launch(SRUN | changed).local_world_size == expected


def test_launch_of_srun_is_read_from_the_step_and_not_the_allocation() -> None:
    """The case is `srun -N1 -n2` inside an allocation of three nodes with three tasks each."""
    step = {
        "SLURM_STEP_NODELIST": "gpu05",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_NODEID": "0",
    }
    launch = find_launch(SRUN | step)
    assert (launch.world_size, launch.local_world_size, launch.master_addr) == (2, 2, "gpu05")


def test_master_address_of_the_user_is_used_under_srun() -> None:
    launch = find_launch(SRUN | {"MASTER_ADDR": "gpu04-ib0", "MASTER_PORT": "4711"})
    assert (launch.master_addr, launch.master_port) == ("gpu04-ib0", 4711)


@pytest.mark.parametrize("listing", ["many", "3(x2", "3x2", "3,,1", "3(x2),-1"])
def test_invalid_list_of_tasks_is_refused(listing: str) -> None:
    with pytest.raises(LaunchError, match="SLURM_STEP_TASKS_PER_NODE"):
        find_launch(SRUN | {"SLURM_STEP_TASKS_PER_NODE": listing})


@pytest.mark.parametrize("missing", ["SLURM_NTASKS", "SLURM_LOCALID"])
def test_incomplete_step_is_refused(missing: str) -> None:
    with pytest.raises(LaunchError, match=f"SLURM_PROCID=4 is set, but not {missing};"):
        find_launch(without(SRUN, missing))


@pytest.mark.parametrize("wrong", [{"SLURM_PROCID": "7"}, {"SLURM_LOCALID": "3"}])
def test_step_out_of_range_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="rank"):
        find_launch(SRUN | wrong)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-005,9],x1", "gpu003"),
        ("gpu[9,11-12]", "gpu9"),
        ("node-a-[1-4]", "node-a-1"),
        ("node-a,node-b", "node-a"),
        ("gpu[01-02]-ib.cluster", "gpu01-ib.cluster"),
        ("a[1-2],b[3-4]", "a1"),
        ("rack[0-1]node[03-04]", "rack0node03"),
    ],
)
def test_first_of_nodelist_expands_ranges(nodes: str, host: str) -> None:
    assert first_of_nodelist(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",", "[1-2]"])
def test_first_of_nodelist_refuses_an_invalid_list(nodes: str) -> None:
    with pytest.raises(LaunchError, match="node list"):
        first_of_nodelist(nodes)


@pytest.mark.parametrize(
    "step",
    [
        {},
        {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NODELIST": "gpu03"},  # the batch step
        # the interactive step: a shell of `salloc` on the node
        {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "gpu03"},
    ],
)
def test_shell_of_slurm_is_a_single_process(step: dict[str, str]) -> None:
    """The shell has SLURM_PROCID=0 and the job's SLURM_NTASKS. As rank 0 of 4, it would hang."""
    assert find_launch(BATCH_SHELL | step) == ALONE
    torchrun = TORCHRUN | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert find_launch(BATCH_SHELL | step | torchrun).world_size == 2


def test_single_process_among_idle_nodes_is_refused() -> None:
    two_nodes = {"SLURM_JOB_NUM_NODES": "2"}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for environ in (BATCH_SHELL, BATCH_SHELL | TORCHRUN | alone):
        with pytest.raises(LaunchError, match="2 nodes: the other nodes would idle"):
            find_launch(environ | two_nodes)
    one_task = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    with pytest.raises(LaunchError, match="3 nodes"):
        find_launch(SRUN | one_task | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"})
    assert find_launch(BATCH_SHELL | TORCHRUN | two_nodes).world_size == 8


def test_torchrun_smaller_than_its_srun_is_refused() -> None:
    """`srun -n7 torchrun --nproc-per-node 1` would train seven times."""
    once = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(LaunchError, match="WORLD_SIZE=1 but srun started 7 tasks"):
        find_launch(SRUN | TORCHRUN | once)
    one_per_node = {"SLURM_NTASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    assert find_launch(SRUN | one_per_node | TORCHRUN).source == "torchrun"


def test_job_is_read_from_slurm_variables() -> None:
    assert job({}) == env.Job("", 0)
    assert job({"SLURM_JOB_ID": "17"}) == env.Job("17", 0)
    with pytest.raises(LaunchError, match="SLURM_RESTART_COUNT='often'"):
        job({"SLURM_RESTART_COUNT": "often"})


def launch_of(local_world_size: int) -> Launch:
    return Launch(0, local_world_size, 0, local_world_size, "127.0.0.1", 1, "torchrun")


@pytest.mark.parametrize(
    ("environ", "ranks", "expected"),
    [
        ({}, 1, 12),
        ({}, 4, 3),
        ({}, 5, 2),
        ({}, 64, 1),
        ({"OMP_NUM_THREADS": "7"}, 4, 7),
        ({"OMP_NUM_THREADS": "1"}, 4, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 4, 3),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, 4, 2),
        ({"OMP_NUM_THREADS": "0"}, 4, 3),
        ({"OMP_NUM_THREADS": "many"}, 4, 3),
        ({"OMP_NUM_THREADS": "²"}, 4, 3),
    ],
)
def test_threads_follow_omp_num_threads_and_ranks_per_host(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], ranks: int, expected: int
) -> None:
    for key in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(12)), raising=False)
    assert thread_count(launch_of(ranks)) == expected


def test_threads_follow_the_cpu_count_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert thread_count(launch_of(2)) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert thread_count(launch_of(2)) == 1


def test_publish_launch_sets_the_variables_that_find_launch_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = find_launch(SRUN)
    written: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", written)
    env.publish_launch(launch)
    assert find_launch(written) == Launch(**vars(launch) | {"source": "torchrun"})
    env.set_default("RANK", "9")
    env.set_default("NEW", "1")
    assert (written["RANK"], written["NEW"]) == ("4", "1")


def test_has_compiler_searches_cxx_and_the_usual_names(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []

    def which(present: str) -> Any:
        return lambda name: searched.append(name) or (name if name == present else None)

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", which("clang++"))
    assert env.has_compiler()
    monkeypatch.setattr("shutil.which", which("nothing"))
    assert not env.has_compiler()
    monkeypatch.setenv("CXX", "my-c++")
    monkeypatch.setattr("shutil.which", which("my-c++"))
    assert env.has_compiler()
    assert {"g++", "clang++", "my-c++"} <= set(searched)


def test_nearest_suggests_a_name_or_nothing() -> None:
    names = ("hidden_size", "head_dim", "vocab_size")
    assert nearest("hiden_size", names) == '; did you mean "hidden_size"?'
    assert nearest("vocabsize", iter(names)) == '; did you mean "vocab_size"?'
    assert nearest("banana", names) == ""
    assert nearest("x", ()) == ""


def test_launch_id_differs_for_a_requeued_job() -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert launch_id(step) == launch_id(dict(step)) != launch_id({})
    assert launch_id(step | {"SLURM_RESTART_COUNT": "1"}) != launch_id(step)
