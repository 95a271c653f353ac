"""`slurm/pretrain.sbatch` through what happens on a cluster, with toy ranks on a real one."""

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
    """One submission from a checkout of its own."""

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
        try:
            return self.cluster.wait(self.id, *ENDS, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    @property
    def restarts(self) -> int:
        return int(self.cluster.field(self.id, "Restarts"))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return found

    def wait_for(self, what: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: list(self.run.glob(f"checkpoints/step_{step:08d}")))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts as a user has them, and toy ranks where the launcher is."""
    for name in ("slurm", "megalite"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "launcher").mkdir()
    shutil.copy(Path(__file__).with_name("toy.py"), tmp_path / "launcher" / "pretrain.py")
    raw = BASE | {"logging": {"directory": "runs"}}
    (tmp_path / "run.json").write_text(json.dumps(raw))
    return tmp_path


def _plan(checkout: Path, *faults: tuple[int, int, int]) -> None:
    rows = [dict(zip(("attempt", "rank", "step"), fault, strict=True)) for fault in faults]
    (checkout / "faults.json").write_text(json.dumps(rows))


LAUNCHES = ["torchrun", "srun", "deepspeed"]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_time_limit(cluster: Cluster, checkout: Path, launch: str) -> None:
    """All ranks are asked, save and stop; the job goes on where it was."""
    (checkout / "endless").touch()
    # Slurm looks at time limits every 30 s: asked between 30 s (the ranks have begun by then) and
    # 60 s, killed 30 s after that at the earliest
    job = Job(cluster, checkout, launch, "--time=1", "--signal=B:USR1@30")
    assert job.end() == "COMPLETED", job.log
    assert job.restarts >= 1
    assert job.status()["state"] == "done"
    assert "time limit near" in job.log
    stopped = {path.name for path in job.run.glob("ended_0_*")}
    assert stopped == {f"ended_0_{rank}_of_4" for rank in range(4)}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_rank_crash(cluster: Cluster, checkout: Path, launch: str) -> None:
    """The other ranks do not run on, and the job comes back."""
    _plan(checkout, (0, 3, 25))
    job = Job(cluster, checkout, launch)
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert not (job.run / "ended_0_0_of_4").exists() or job.status()["attempt"] == 1


class TuningJob(Job):
    script = "finetune"


def test_finetuning_does_the_same(cluster: Cluster, checkout: Path) -> None:
    (checkout / "launcher" / "pretrain.py").rename(checkout / "launcher" / "finetune.py")
    _plan(checkout, (0, 3, 25))
    job = TuningJob(cluster, checkout, "srun")
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert job.status()["state"] == "done"


def test_a_preemption(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "torchrun", "--partition=debug")
    job.wait_for_step(10)
    urgent = cluster.submit(
        *("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 2"), cwd=checkout
    )
    assert cluster.wait(urgent, *ENDS) == "COMPLETED"
    assert job.end() == "COMPLETED", job.log
    assert job.restarts >= 1
    assert job.status()["state"] == "done"


def test_a_lost_node(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "torchrun")
    job.wait_for_step(10)
    cluster.call(str(SCRIPT), "kill-node", "n2")
    cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=lost")
    job.wait_for(lambda: cluster.state(job.id) == "PENDING")
    cluster.call(str(SCRIPT), "start-node", "n2")
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1


def test_a_crash_loop_stops(cluster: Cluster, checkout: Path) -> None:
    """Before its first save, and again: the second start in a row that leads nowhere."""
    _plan(checkout, *((attempt, 1, 5) for attempt in range(9)))
    job = Job(cluster, checkout, "torchrun")
    assert job.end() == "FAILED", job.log
    assert job.restarts == 1
    assert "2 starts in a row have saved nothing new" in job.log


def test_scancel_stays_cancelled(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "torchrun")
    job.wait_for_step(10)
    cluster.call("scancel", job.id)
    assert job.end() == "CANCELLED", job.log
    time.sleep(8)  # a requeued job would be back after 5
    assert cluster.state(job.id) == "CANCELLED"
    assert job.restarts == 0


def test_a_real_run(cluster: Cluster, checkout: Path, shards: dict[str, str]) -> None:
    """A rank is killed; the job comes back alone, to the losses of a run left in peace."""
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
    alone = raw | {"logging": raw["logging"] | {"directory": str(checkout / "alone")}}
    run_ranks(train, 4, alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        assert curve(raw) == curve(alone)


def _processes(job: str, *, rank: int) -> list[int]:
    """Return the Python processes of one rank of a job."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environ = set((folder / "environ").read_bytes().split(b"\0"))
            if wanted <= environ and b"pretrain" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def test_a_faulty_run_file_starts_nothing(cluster: Cluster, checkout: Path) -> None:
    (checkout / "run.json").write_text(json.dumps(BASE | {"trainig": {}}))
    job = Job(cluster, checkout, "torchrun")
    assert job.end() == "FAILED"
    assert cluster.field(job.id, "ExitCode") == "2:0"
    assert 'did you mean "training"?' in job.log
    assert not (checkout / "runs").exists()
