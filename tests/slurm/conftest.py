"""Fixture that starts a real Slurm cluster of two nodes on this host."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cluster.sh")


class Cluster:
    """The cluster, with methods to submit jobs and to read their states."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "SLURM_CLUSTER_DIR": str(folder),
            "SLURM_CLUSTER_PORT": "27817",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command and return its output.

        Raises:
            AssertionError: the command failed. The message contains its output.
        """
        done = subprocess.run(
            command, env=self.environ, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path) -> str:
        """Submit a job and return its id."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd)

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        text = self.call("scontrol", "show", "job", job)
        return next(word for word in text.split() if word.startswith(f"{name}=")).partition("=")[2]

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """Wait until a job has one of `states`, and return this state."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state} after {seconds:.0f} s"
            time.sleep(0.2)
        return state


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [name for name in ("slurmctld", "slurmd", "munged") if not _find(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; apt-get install -y slurm-wlm munge")
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        started.call(str(SCRIPT), "up")
    except AssertionError as error:
        pytest.skip(f"a Slurm cluster cannot be started here: {error}")
    yield started
    started.call(str(SCRIPT), "clean")


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
