"""Tests of `slurm/prep.sbatch` on a real cluster of two nodes."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

from data_prep.encode import TokenizeOptions, tokenize
from tests.slurm.conftest import Cluster
from tests.unit.data_prep.test_prep_parallel import hashes

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slurm


@pytest.fixture
def submit_folder(tmp_path: Path) -> Path:
    """Make a folder with the files of a checkout that a job uses, and a corpus."""
    for name in ("slurm", "data_prep", "megalite"):
        (tmp_path / name).symlink_to(ROOT / name)
    draw = random.Random(3)
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for _ in range(20_000):
            file.write(json.dumps({"text": "word " * draw.randrange(1, 150)}) + "\n")
    (tmp_path / "site.env").write_text(f"export MEGALITE_PYTHON={sys.executable}\n")
    return tmp_path


def test_prep_job_with_a_requeue_writes_the_bytes_of_one_process(
    cluster: Cluster, submit_folder: Path
) -> None:
    cluster.environ["MEGALITE_SITE"] = str(submit_folder / "site.env")
    job = cluster.submit(
        *("--cpus-per-task=2", "slurm/prep.sbatch", "--input", "corpus.jsonl"),
        *("--tokenizer", "bytes", "--output", "out", "--shard-tokens", "1000000"),
        cwd=submit_folder,
    )
    work = submit_folder / ".out.work"
    while not list(work.glob("parts/*.part")):  # the job is requeued when some parts are done
        assert cluster.state(job) in ("PENDING", "RUNNING"), log_of(submit_folder)
        time.sleep(0.05)
    cluster.call("scontrol", "requeue", job)
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log_of(submit_folder)
    assert cluster.field(job, "Restarts") == "1"
    assert not work.exists()
    options = TokenizeOptions(
        ["corpus.jsonl"], "bytes", submit_folder / "one", shard_tokens=1_000_000
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(submit_folder)
        tokenize(options)
    assert hashes(submit_folder / "out") == hashes(submit_folder / "one")


def test_prep_job_with_invalid_input_fails_without_requeue(
    cluster: Cluster, submit_folder: Path
) -> None:
    cluster.environ["MEGALITE_SITE"] = str(submit_folder / "site.env")
    shutil.copyfile(submit_folder / "corpus.jsonl", submit_folder / "bad.jsonl")
    with open(submit_folder / "bad.jsonl", "a") as file:
        file.write('{"text": \n')
    job = cluster.submit(
        *("--cpus-per-task=2", "slurm/prep.sbatch", "--input", "bad.jsonl"),
        *("--tokenizer", "bytes", "--output", "bad"),
        cwd=submit_folder,
    )
    assert cluster.wait(job, "COMPLETED", "FAILED") == "FAILED", log_of(submit_folder)
    assert "bad.jsonl line 20001: not valid JSON" in log_of(submit_folder)
    assert cluster.field(job, "Restarts") == "0"
    assert not (submit_folder / "bad").exists()


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("megalite-prep-*.out"))
