# covers: megalite/doctor/examine.py megalite/doctor/runfile.py launcher/doctor.py
"""launcher/doctor.py as it is started: on this machine, on a run file, on what is not there."""

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
from megalite.doctor import Row, examine, host, runfile, software
from megalite.doctor.row import GIB
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
    """The machine's own rows cost seconds, and are tested elsewhere."""
    monkeypatch.setattr(software, "look_mpi", lambda: Row("ok", "MPI"))
    monkeypatch.setattr(software, "look_slurm", lambda: Row("ok", "Slurm"))
    monkeypatch.setattr(host, "_TRIED", 1 << 20)


def rows_of(path: str) -> dict[str, Row]:
    return {row.name: row for row in examine(path, preview)}


def test_the_machine_as_a_table(tmp_path: Path) -> None:
    done = doctor(folder=tmp_path)
    assert done.stderr == ""
    names = [line.split("  ")[0] for line in done.stdout.splitlines()[1:]]
    assert [name for name in names if name] == MACHINE
    assert done.returncode == int(" fail " in done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_good_run_file_as_json_beside_a_run(shards: dict[str, str], tmp_path: Path) -> None:
    raw = run_file(shards, tmp_path / "runs")
    run_ranks(train, 1, raw | {"training": raw["training"] | {"steps": 2}})
    config = write(tmp_path / "c.json", raw)
    folder = str(tmp_path / "runs/run")
    done = doctor("--config", config, "--run", folder, "--json", folder=tmp_path)
    told = json.loads(done.stdout)
    assert [row["name"] for row in told["rows"]] == [*MACHINE, *RUN]
    assert {row["name"]: row["state"] for row in told["rows"]}.items() >= dict.fromkeys(
        RUN, "ok"
    ).items()
    assert told["ok"] == (done.returncode == 0)
    assert told["run"]["state"] == "done"
    assert told["ok"], told["rows"]
    (data,) = (row for row in told["rows"] if row["name"] == "data")
    assert data["found"].startswith("1 sources, ")


def test_a_faulty_run_file_is_a_row_and_the_rest_appears(tmp_path: Path) -> None:
    raw = run_file({"train": "x", "valid": "x"}, tmp_path, nmae="x")
    raw["training"] |= {"step": 3, "micro_batch_size": 0}
    done = doctor("--config", write(tmp_path / "c.json", raw), "--json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    *others, last = json.loads(done.stdout)["rows"]
    assert [row["name"] for row in others] == MACHINE
    assert (last["name"], last["state"]) == ("run file", "fail")
    assert len(last["found"].splitlines()) == 3
    assert 'did you mean "name"?' in last["found"]


def test_what_is_not_there_is_the_users_to_mend(tmp_path: Path) -> None:
    for option, words in (("--run", "cannot read metrics.jsonl"), ("--config", "no such run file")):
        done = doctor(option, "none", folder=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_torch_that_does_not_load_is_a_row(tmp_path: Path) -> None:
    stub = tmp_path / "stub/torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise OSError('libtorch.so: cannot open')\n")
    done = doctor("--json", folder=tmp_path, PYTHONPATH=f"{stub.parent}:{ROOT}")
    assert done.returncode == 1
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert [*rows] == MACHINE
    assert "libtorch.so: cannot open" in rows["GPUs"]["found"]


# --- the rows of a run file ------------------------------------------------------------------


def test_shards_are_opened_and_held_against_the_model(
    quick: None, shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path, model={"vocab_size": 100})
    rows = rows_of(write(tmp_path / "c.json", raw))
    assert rows["data"].state == "fail"
    assert "its tokenizer has 258 ids, but model.vocab_size is 100" in rows["data"].found
    assert rows["plan"].state == "ok"
    raw = run_file({"train": str(tmp_path / "none"), "valid": shards["valid"]}, tmp_path)
    assert "none does not exist" in rows_of(write(tmp_path / "c.json", raw))["data"].found


def test_a_run_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_memory", lambda: 8 * GIB)
    assert runfile.memory(run_config()).state == "ok"
    monkeypatch.setattr(checks, "available_memory", lambda: 1000)
    row = runfile.memory(run_config())
    assert row.state == "fail"
    assert "0.0 GiB are free on this host" in row.found


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
def test_checkpoints_need_room(section: dict[str, Any], count: int, tmp_path: Path) -> None:
    """Ten steps; weights and two moments in fp32."""
    config = run_config(checkpoint=section, logging={"directory": str(tmp_path)})
    size = 12 * make_plan(config, world_size=1, device="cpu").parameters
    assert runfile.checkpoints(config, count * size).state == "ok"
    row = runfile.checkpoints(config, count * size - 1)
    assert (row.state, row.found.split()[0]) == ("fail", str(count))
    there = tmp_path / "run/checkpoints/step_00000001/weights"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"x")
    assert runfile.checkpoints(config, count * size - 1).state == "ok"


def tuning(path: str, task: str = "classification", **data: Any) -> dict[str, Any]:
    section = {"path": path, "max_length": 8} | data
    config = run_config(finetune={"task": task, "data": section}, data={"train": []})
    return config.model_dump(mode="json")


def test_examples_are_looked_at(quick: None, tmp_path: Path) -> None:
    path = write_jsonl(str(tmp_path / "rows.jsonl"), ROWS)
    raw = tuning(path, tokenizer="bytes")
    raw["model"]["vocab_size"] = 300
    rows = rows_of(write(tmp_path / "c.json", raw))
    assert rows["data"] == Row("ok", f"{path}: train with text, label", "", "data")
    raw["finetune"]["data"]["label_column"] = "star"
    row = rows_of(write(tmp_path / "c.json", raw))["data"]
    assert (row.state, "no field 'star'; it has text, label" in row.found) == ("fail", True)


def test_faults_of_examples(tmp_path: Path) -> None:
    def look(path: str, **data: Any) -> str:
        return preview(parse_config(tuning(path, **data)))

    path = write_jsonl(str(tmp_path / "rows.jsonl"), [{"text": "x"}, *ROWS])
    assert look(path, max_bad_rows=1).endswith("train with text, label")
    with pytest.raises(DataError, match="line 1: no field 'label'"):
        look(path)
    with pytest.raises(DataError, match=r"model.vocab_size: 61, but the tokenizer has 258 ids"):
        look(path, max_bad_rows=1, tokenizer="bytes")
    with pytest.raises(DataError, match="the train split has no row"):
        look(write_jsonl(str(tmp_path / "empty.jsonl"), [""]))
    with pytest.raises(DataError, match="there is no such file or folder"):
        look(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="split 'test': no such split"):
        look(path, max_bad_rows=1, test_split="test")


def test_a_model_may_stand_in_the_runs_checkpoints(tmp_path: Path) -> None:
    raw = tuning("rows.jsonl")
    raw["logging"] = {"directory": str(tmp_path)}
    model = raw.pop("model")
    config = write(tmp_path / "c.json", raw)
    with pytest.raises(ConfigError, match="model: is missing"):
        runfile.load(config)
    step = tmp_path / "run/checkpoints/step_00000001"
    step.mkdir(parents=True)
    folder = tmp_path / "start"
    folder.mkdir()
    with pytest.raises(CommandError, match="start"):
        runfile.load(config, folder)
    (step / "manifest.json").write_text("{}")
    write(step / "config.json", {"model": model})
    assert runfile.load(config).model.vocab_size == 61
