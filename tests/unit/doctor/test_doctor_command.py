# covers: megalite/doctor/examine.py megalite/doctor/runfile.py launcher/doctor.py
# covers: megalite/commands/doctor.py
"""launcher/doctor.py on this machine, on run files, and on paths that do not exist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.preview import preview
from megalite.config import parse_config
from megalite.doctor import CheckResult, examine, host, runfile, software
from megalite.doctor.result import GIB
from megalite.errors import CommandError, ConfigError, DataError
from megalite.plan import make_plan
from megalite.train import checks
from tests.helpers.models import run_config
from tests.helpers.ranks import run_ranks
from tests.helpers.rows import ROWS, write_jsonl
from tests.helpers.runs import run_file, train

ROOT = Path(__file__).resolve().parents[3]
MACHINE = [
    *("Python", "torch", "deepspeed", "packages", "GPUs", "CPU", "compiler", "MPI", "Slurm"),
    *("memory", "/dev/shm", "limits", "disk", "clock", "ports"),
]
RUN = ["run file", "data", "plan", "checkpoints"]


def doctor(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launcher/doctor.py"), *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


def write(path: Path, raw: dict[str, Any]) -> str:
    path.write_text(json.dumps(raw))
    return str(path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the checks of the machine that take seconds."""
    monkeypatch.setattr(software, "probe_mpi", lambda: CheckResult("ok", "MPI"))
    monkeypatch.setattr(software, "probe_slurm", lambda: CheckResult("ok", "Slurm"))
    monkeypatch.setattr(host, "_TEST_BYTES", 1 << 20)


def results_of(path: str) -> dict[str, CheckResult]:
    return {result.name: result for result in examine(path, preview)}


def test_doctor_prints_a_table_of_the_machine(tmp_path: Path) -> None:
    done = doctor(folder=tmp_path)
    assert done.stderr == ""
    names = [line.split("  ")[0] for line in done.stdout.splitlines()[1:]]
    assert [name for name in names if name] == MACHINE
    assert done.returncode == int(" fail " in done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_doctor_reports_a_run_file_and_a_run_as_json(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path / "runs")
    run_ranks(train, 1, raw | {"training": raw["training"] | {"steps": 2}})
    config = write(tmp_path / "c.json", raw)
    folder = str(tmp_path / "runs/run")
    done = doctor("--config", config, "--run", folder, "--json", folder=tmp_path)
    report = json.loads(done.stdout)
    assert [row["name"] for row in report["rows"]] == [*MACHINE, *RUN]
    assert {row["name"]: row["state"] for row in report["rows"]}.items() >= dict.fromkeys(
        RUN, "ok"
    ).items()
    assert report["ok"] == (done.returncode == 0)
    assert report["run"]["state"] == "done"
    assert report["ok"], report["rows"]
    (data,) = (row for row in report["rows"] if row["name"] == "data")
    assert data["found"].startswith("1 sources, ")


def test_doctor_reports_a_faulty_run_file_and_the_machine(tmp_path: Path) -> None:
    raw = run_file({"train": "x", "valid": "x"}, tmp_path, nmae="x")
    raw["training"] |= {"step": 3, "micro_batch_size": 0}
    done = doctor("--config", write(tmp_path / "c.json", raw), "--json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    *others, last = json.loads(done.stdout)["rows"]
    assert [row["name"] for row in others] == MACHINE
    assert (last["name"], last["state"]) == ("run file", "fail")
    assert len(last["found"].splitlines()) == 3
    assert 'did you mean "name"?' in last["found"]


def test_doctor_refuses_a_path_that_does_not_exist(tmp_path: Path) -> None:
    for option, words in (("--run", "cannot read metrics.jsonl"), ("--config", "no such run file")):
        done = doctor(option, "none", folder=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_doctor_reports_a_torch_that_does_not_load(tmp_path: Path) -> None:
    stub = tmp_path / "stub/torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise OSError('libtorch.so: cannot open')\n")
    done = doctor("--json", folder=tmp_path, PYTHONPATH=f"{stub.parent}:{ROOT}")
    assert done.returncode == 1
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert [*rows] == MACHINE
    assert "libtorch.so: cannot open" in rows["GPUs"]["found"]


# --- the checks of a run file ----------------------------------------------------------------


def test_data_check_compares_shards_with_the_model(
    quick: None, shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path, model={"vocab_size": 100})
    results = results_of(write(tmp_path / "c.json", raw))
    assert results["data"].state == "fail"
    assert "its tokenizer has 258 ids, but model.vocab_size is 100" in results["data"].detail
    assert results["plan"].state == "ok"
    raw = run_file({"train": str(tmp_path / "none"), "valid": shards["valid"]}, tmp_path)
    assert "none does not exist" in results_of(write(tmp_path / "c.json", raw))["data"].detail


def test_memory_check_fails_if_the_run_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_memory", lambda: 8 * GIB)
    assert runfile.memory_plan(run_config()).state == "ok"
    monkeypatch.setattr(checks, "available_memory", lambda: 1000)
    result = runfile.memory_plan(run_config())
    assert result.state == "fail"
    assert "0.0 GiB are free on this host" in result.detail


@pytest.mark.parametrize(
    ("section", "count"),
    [
        ({"every": 1, "keep": 2}, 3),
        ({"every": 1, "keep": 2, "keep_best": True}, 4),
        ({"every": 1, "keep": 1, "keep_every": 2}, 7),
        ({"every": 5, "keep": 3}, 2),
        ({"every": 0, "keep": 3}, 1),
    ],
)
def test_checkpoint_check_counts_all_that_are_kept(
    section: dict[str, Any], count: int, tmp_path: Path
) -> None:
    """The run has ten steps; a checkpoint has weights and two moments in fp32."""
    config = run_config(checkpoint=section, logging={"directory": str(tmp_path)})
    size = 12 * make_plan(config, world_size=1, device="cpu").parameters
    assert runfile.checkpoints(config, count * size).state == "ok"
    result = runfile.checkpoints(config, count * size - 1)
    assert (result.state, result.detail.split()[0]) == ("fail", str(count))
    written = tmp_path / "run/checkpoints/step_00000001/weights"
    written.parent.mkdir(parents=True)
    written.write_bytes(b"x")
    assert runfile.checkpoints(config, count * size - 1).state == "ok"


def tuning(path: str, task: str = "classification", **data: Any) -> dict[str, Any]:
    section = {"path": path, "max_length": 8} | data
    config = run_config(finetune={"task": task, "data": section}, data={"train": []})
    return config.model_dump(mode="json")


def test_data_check_previews_examples(quick: None, tmp_path: Path) -> None:
    path = write_jsonl(str(tmp_path / "rows.jsonl"), ROWS)
    raw = tuning(path, tokenizer="bytes")
    raw["model"]["vocab_size"] = 300
    results = results_of(write(tmp_path / "c.json", raw))
    assert results["data"] == CheckResult("ok", f"{path}: train with text, label", "", "data")
    raw["finetune"]["data"]["label_column"] = "star"
    result = results_of(write(tmp_path / "c.json", raw))["data"]
    assert result.state == "fail"
    assert "no field 'star'; it has text, label" in result.detail


def test_preview_refuses_invalid_examples(tmp_path: Path) -> None:
    def preview_of(path: str, **data: Any) -> str:
        return preview(parse_config(tuning(path, **data)))

    path = write_jsonl(str(tmp_path / "rows.jsonl"), [{"text": "x"}, *ROWS])
    assert preview_of(path, max_bad_rows=1).endswith("train with text, label")
    with pytest.raises(DataError, match="line 1: no field 'label'"):
        preview_of(path)
    with pytest.raises(DataError, match=r"model.vocab_size: 61, but the tokenizer has 258 ids"):
        preview_of(path, max_bad_rows=1, tokenizer="bytes")
    with pytest.raises(DataError, match="the train split has no row"):
        preview_of(write_jsonl(str(tmp_path / "empty.jsonl"), [""]))
    with pytest.raises(DataError, match="there is no such file or folder"):
        preview_of(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="split 'test': no such split"):
        preview_of(path, max_bad_rows=1, test_split="test")


def test_run_file_check_takes_the_model_from_checkpoints_of_the_run(tmp_path: Path) -> None:
    raw = tuning("rows.jsonl")
    raw["logging"] = {"directory": str(tmp_path)}
    model = raw.pop("model")
    config = write(tmp_path / "c.json", raw)
    with pytest.raises(ConfigError, match="model: is missing"):
        runfile.load_run_file(config)
    step = tmp_path / "run/checkpoints/step_00000001"
    step.mkdir(parents=True)
    folder = tmp_path / "start"
    folder.mkdir()
    with pytest.raises(CommandError, match="start"):
        runfile.load_run_file(config, folder)
    (step / "manifest.json").write_text("{}")
    write(step / "config.json", {"model": model})
    assert runfile.load_run_file(config).model.vocab_size == 61
