"""Tests of `slurm/pretrain.sbatch` and `slurm/finetune.sbatch` on a real cluster of two nodes.

The ranks are those of toy.py, except in one test.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import BASE, curve, run_file, train
from tests.slurm.conftest import SCRIPT, Cluster

ROOT = Path(__file__).resolve().parents[2]
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


class Job:
    """A job that is submitted from its own checkout.

    Args:
        launch: value of MEGALITE_LAUNCH.
        options: options of sbatch.
    """

    script = "pretrain"

    def __init__(self, cluster: Cluster, folder: Path, launch: str, *options: str) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "runs" / "run"
        cluster.environ["MEGALITE_SITE"] = str(folder / "site.env")
        (folder / "site.env").write_text(
            f"export MEGALITE_PYTHON={sys.executable} MEGALITE_LAUNCH={launch}\n"
            "export MEGALITE_RANKS_PER_NODE=2 OMP_NUM_THREADS=1\n"
        )
        self.id = cluster.submit(
            *("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2", *options),
            *(f"slurm/{self.script}.sbatch", "run.json"),
            cwd=folder,
        )

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("megalite-*.out"))

    def end(self, seconds: float = 180) -> str:
        """Wait for the job's end and return its state."""
        try:
            return self.cluster.wait(self.id, *ENDS, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    @property
    def restarts(self) -> int:
        return int(self.cluster.field(self.id, "Restarts"))

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return status

    def wait_until(self, condition: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: list(self.run.glob(f"checkpoints/step_{step:08d}")))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a folder with the files of a checkout that a job uses, and toy.py as the launcher."""
    for name in ("slurm", "megalite"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "launcher").mkdir()
    shutil.copy(Path(__file__).with_name("toy.py"), tmp_path / "launcher" / "pretrain.py")
    raw = BASE | {"logging": {"directory": "runs"}}
    (tmp_path / "run.json").write_text(json.dumps(raw))
    return tmp_path


def _plan_faults(checkout: Path, *faults: tuple[int, int, int]) -> None:
    """Write faults.json: each fault has the attempt, the rank and the step of a crash."""
    rows = [dict(zip(("attempt", "rank", "step"), fault, strict=True)) for fault in faults]
    (checkout / "faults.json").write_text(json.dumps(rows))


LAUNCHES = ["torchrun", "srun", "deepspeed"]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_time_limit_saves_and_requeues(cluster: Cluster, checkout: Path, launch: str) -> None:
    """All ranks get the signal, save and stop. The requeued job resumes."""
    (checkout / "endless").touch()
    # Slurm checks time limits every 30 s. It sends the signal 30 to 60 s after the start, when the
    # ranks are running, and kills the job at least 30 s later.
    job = Job(cluster, checkout, launch, "--time=1", "--signal=B:USR1@30")
    assert job.end() == "COMPLETED", job.log
    assert job.restarts >= 1
    assert job.status()["state"] == "done"
    assert "time limit near" in job.log
    stopped = {path.name for path in job.run.glob("ended_0_*")}
    assert stopped == {f"ended_0_{rank}_of_4" for rank in range(4)}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_rank_crash_requeues(cluster: Cluster, checkout: Path, launch: str) -> None:
    """The other ranks are stopped, and the job is requeued."""
    _plan_faults(checkout, (0, 3, 25))
    job = Job(cluster, checkout, launch)
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert not (job.run / "ended_0_0_of_4").exists() or job.status()["attempt"] == 1


class FinetuneJob(Job):
    """A job of slurm/finetune.sbatch."""

    script = "finetune"


def test_finetuning_job_requeues_after_a_crash(cluster: Cluster, checkout: Path) -> None:
    (checkout / "launcher" / "pretrain.py").rename(checkout / "launcher" / "finetune.py")
    _plan_faults(checkout, (0, 3, 25))
    job = FinetuneJob(cluster, checkout, "srun")
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert job.status()["state"] == "done"


def test_preemption_saves_and_requeues(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "torchrun", "--partition=debug")
    job.wait_for_step(10)
    urgent = cluster.submit(
        *("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 2"), cwd=checkout
    )
    assert cluster.wait(urgent, *ENDS) == "COMPLETED"
    assert job.end() == "COMPLETED", job.log
    assert job.restarts >= 1
    assert job.status()["state"] == "done"


def test_lost_node_requeues(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "torchrun")
    job.wait_for_step(10)
    cluster.call(str(SCRIPT), "kill-node", "n2")
    cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=lost")
    job.wait_until(lambda: cluster.state(job.id) == "PENDING")
    cluster.call(str(SCRIPT), "start-node", "n2")
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1


def test_crash_loop_fails_after_two_starts(cluster: Cluster, checkout: Path) -> None:
    """Both starts crash before their first save, so the second one is not requeued."""
    _plan_faults(checkout, *((attempt, 1, 5) for attempt in range(9)))
    job = Job(cluster, checkout, "torchrun")
    assert job.end() == "FAILED", job.log
    assert job.restarts == 1
    assert "2 starts in a row have saved nothing new" in job.log


def test_scancel_stays_cancelled(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "torchrun")
    job.wait_for_step(10)
    cluster.call("scancel", job.id)
    assert job.end() == "CANCELLED", job.log
    time.sleep(8)  # a requeued job would start again after 5 s
    assert cluster.state(job.id) == "CANCELLED"
    assert job.restarts == 0


def test_run_with_a_killed_rank_has_the_losses_of_an_uninterrupted_run(
    cluster: Cluster, checkout: Path, shards: dict[str, str]
) -> None:
    """The job is requeued without help, and resumes a real run."""
    shutil.rmtree(checkout / "launcher")
    (checkout / "launcher").symlink_to(ROOT / "launcher")
    raw = run_file(
        shards,
        "runs",
        training={"steps": 120, "eval_every": 0, "log_every": 1},
        checkpoint={"every": 20},
    )
    (checkout / "run.json").write_text(json.dumps(raw))
    job = Job(cluster, checkout, "srun")
    job.wait_for_step(40)
    (rank,) = _processes(job.id, rank=3)
    os.kill(rank, signal.SIGKILL)
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert job.status()["state"] == "done"
    assert job.status()["attempt"] == 1
    uninterrupted = raw | {"logging": raw["logging"] | {"directory": str(checkout / "other")}}
    run_ranks(train, 4, uninterrupted)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        assert curve(raw) == curve(uninterrupted)


def _processes(job: str, *, rank: int) -> list[int]:
    """Return the ids of the Python processes of a job's rank."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environ = set((folder / "environ").read_bytes().split(b"\0"))
            if wanted <= environ and b"pretrain" in (folder / "cmdline").read_bytes():
                pids.append(int(folder.name))
    return pids


def test_invalid_run_file_starts_no_ranks(cluster: Cluster, checkout: Path) -> None:
    (checkout / "run.json").write_text(json.dumps(BASE | {"trainig": {}}))
    job = Job(cluster, checkout, "torchrun")
    assert job.end() == "FAILED"
    assert cluster.field(job.id, "ExitCode") == "2:0"
    assert 'did you mean "training"?' in job.log
    assert not (checkout / "runs").exists()
