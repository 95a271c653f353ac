# covers: megalite/plan/devices.py
"""What a planner is given: device files, records of runs, and command lines that cannot be."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalite.config import load_config
from megalite.errors import CommandError, ConfigError
from megalite.files import check_target
from megalite.plan import make_plan
from megalite.plan.calibrate import _fit, calibrate, read_run
from megalite.plan.devices import CPU, DEVICES, by_driver_name, find_device, make_device
from megalite.plan.forecast import forecast
from megalite.plan.search import search
from megalite.plan.seconds import Cluster, step_seconds
from megalite.plan.tables import describe_forecast

ROOT = Path(__file__).resolve().parents[3]
LORA = ROOT / "configs" / "finetune" / "lora.json"


def shipped(name: str, *sets: str) -> Any:
    return load_config(ROOT / "configs" / f"{name}.json", sets)


def command(launcher: str, *arguments: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "launcher" / f"{launcher}.py"), *map(str, arguments)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        line, cwd=folder, capture_output=True, text=True, check=False, env=environ, timeout=60
    )


# ---- device files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", r"expected one JSON object \{\.\.\.\}, found \[\]"),
        ("{", "line 1 column 2: not JSON"),
        ("[" * 5000, "over 30 deep"),
        ('{"extends": "cpu", "link": NaN}', "NaN is not a JSON number"),
        ('{"extends": "cpu", "link": 1e400}', "out of a number's range"),
        ('{"extends": "cpu", "memory": 9' + "9" * 30 + "}", "out of range"),
        ('{"extends": "cpu", "extends": "h100"}', '"extends" is written twice'),
        ('{"extends": "h101"}', r'extends: "h101": no such device; did you mean "h100"\?'),
        ('{"extends": 5}', "extends: 5: no such device; it is one of b200"),
        ('{"memory": 85899345920}', 'extends: is missing; .*"h100-80gb", or write name, kind'),
        ('{"extends": "cpu", "memry": 1}', r'"memry": unknown key; did you mean "memory"\?'),
        ('{"extends": "cpu", "kind": "cuda"}', '"kind": unknown key'),
        (
            '{"extends": "h100", "memory": 80}',
            r"memory: expected .* bytes \(80 GiB are .* found 80",
        ),
        ('{"extends": "h100", "memory": true}', "memory: .* found true"),
        ('{"extends": "h100", "link": 1e-30}', r"link: expected .* bytes/s, found 1e-30"),
        ('{"extends": "h100", "bf16": 989}', r"bf16: expected .* FLOP/s .* found 989"),
        ('{"extends": "h100", "link": null}', "link: expected .* found null"),
        ('{"extends": "v100-sxm2", "fp16": null, "fp32": null}', "all are null"),
        ('{"extends": "cpu", "efficiencies": 1}', "expected an object of shares"),
        ('{"extends": "cpu", "efficiencies": {"matmul": 1.3}}', r"matmul: expected 1e-06 to 1, "),
        ('{"extends": "cpu", "efficiencies": {"matmull": 1}}', 'did you mean "matmul"'),
        ('{"extends": "cpu", "name": "my/gpu"}', "name: .* is no file's name"),
        ('{"extends": "cpu", "name": "a\\u001b[1m"}', "name: .* is no file's name"),
        ('{"extends": "cpu", "name": ""}', "name: .* is no file's name"),
        ('{"extends": "cpu", "name": 5}', "name: expected text"),
        ('{"extends": "cpu", "native_bf16": 1}', "native_bf16: expected true or false, found 1"),
    ],
)
def test_a_file_that_describes_no_device(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(CommandError, match=rf"--gpu {file}: .*{said}"):
        find_device(str(file))


@pytest.mark.parametrize(
    ("device", "stage", "expected"),
    [
        ({"extends": "cpu"}, 1, "fp32"),
        ({"extends": "cpu", "native_bf16": True}, 1, "bf16"),
        ({"extends": "cpu", "native_bf16": True}, 0, "fp32"),
        ({"extends": "cpu", "native_bf16": True}, 3, "bf16"),
        ({"extends": "h100-80gb"}, 1, "bf16"),
    ],
)
def test_auto_precision_is_that_of_the_planned_device(
    device: dict[str, Any], stage: int, expected: str
) -> None:
    run = shipped("smoke", "training.precision=auto", f"deepspeed.zero_optimization.stage={stage}")
    assert forecast(run, Cluster(make_device(device), 1, 2)).plan.precision == expected


def test_native_bf16_of_a_whole_device_file_follows_its_kind() -> None:
    left = ("efficiencies", "native_bf16")
    for device in (CPU, DEVICES["h100"]):
        whole = {key: value for key, value in vars(device).items() if key not in left}
        assert make_device(whole) == device


@pytest.mark.parametrize("native", [True, False])
def test_a_calibrated_cpu_records_its_native_bf16(native: bool, tmp_path: Path) -> None:
    folder = record(tmp_path / "run", RECORD | {"native_bf16": native})
    assert make_device(calibrate([folder])).native_bf16 is native


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.json")
    with pytest.raises(CommandError, match="not a regular file"):
        find_device(str(tmp_path / "mine.json"))
    with pytest.raises(CommandError, match="no such file"):
        find_device(str(tmp_path / "none.json"))


def test_the_kind_is_of_what_a_file_extends_and_the_name_is_free() -> None:
    named = make_device({"extends": "H100-80GB", "name": "cpu", "bf16": None})
    assert (named.kind, named.bf16, named.fp16) == ("cuda", None, DEVICES["h100"].fp16)
    laptop = make_device({"extends": "cpu", "name": "laptop"})
    run = shipped("smoke")
    one, other = (forecast(run, Cluster(device, 1, 2)) for device in (laptop, CPU))
    assert one.as_json(1) == other.as_json(1)
    whole = {key: value for key, value in vars(CPU).items() if key != "efficiencies"}
    assert make_device(whole) == CPU


@pytest.mark.parametrize(
    ("name", "memory", "found"),
    [
        ("Tesla V100-SXM2-16GB", None, "v100-sxm2-16gb"),
        ("Tesla V100-SXM2-32GB", None, "v100-sxm2"),
        ("NVIDIA A100-SXM-64GB", None, None),
        ("NVIDIA GH200 480GB", None, "gh200-480gb"),
        ("NVIDIA H100 80GB HBM3", 85_029_158_912, "h100-80gb"),
        ("NVIDIA A100-SXM4-80GB", 64 << 30, None),
    ],
)
def test_a_drivers_name_and_memory(name: str, memory: int | None, found: str | None) -> None:
    device = by_driver_name(name, memory)
    assert (device and device.name) == found


# ---- forecasts


def test_a_precision_that_a_device_lacks_names_those_it_has() -> None:
    with pytest.raises(ConfigError, match="a cpu has no units for fp16; set it to bf16 or fp32"):
        forecast(shipped("smoke", "training.precision=fp16"), Cluster(CPU, 1, 1))
    with pytest.raises(ConfigError, match=r"MLP \(5632\); try 1 or 2 or 4$"):
        forecast(shipped("1b", "parallel.tensor=6"), Cluster(DEVICES["h100"], 1, 6))


@pytest.mark.parametrize(
    ("device", "hosts", "sets", "said"),
    [
        ("v100-sxm2", 1, [], "a v100-sxm2 has no units for bf16"),
        ("cpu", 1, ["training.precision=fp16"], "a cpu has no units for fp16"),
        ("h100", 3, [], "is not a multiple of micro_batch_size"),
        ("h100", 1000, [], "is not a multiple of micro_batch_size"),
    ],
)
def test_a_search_in_vain_says_what_is_wrong(
    device: str, hosts: int, sets: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        search(shipped("1b", *sets), Cluster(DEVICES[device], hosts, 8))


def test_a_table_keeps_to_the_terminal_and_has_a_row_a_message() -> None:
    tiny = dataclasses.replace(DEVICES["h100"], memory=80)
    run = shipped("70b", "parallel.tensor=8")
    text = describe_forecast(run, forecast(run, Cluster(tiny, 16, 8)))
    assert max(len(line) for line in text.splitlines() if "#" in line) == 80
    assert "#>" in text
    sent = [line.split()[:3] for line in text.partition("a step sends")[2].splitlines()[1:]]
    assert len({*map(tuple, sent)}) == len(sent) > 3


# ---- records of runs

RECORD = {"device": "cpu", "hosts": 1, "per_host": 2, "measured": {"step_seconds": 0.5}}


def record(folder: Path, content: Any, *sets: str) -> Path:
    run = shipped("smoke", "training.precision=fp32", *sets)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(run.model_dump(mode="json")))
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "plan.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "device: expected a name"),
        ([], "expected one JSON object"),
        ("[" * 5000, "over 30 deep"),
        (RECORD | {"device": ["cpu"]}, "device: expected a name"),
        (RECORD | {"hosts": 0}, "hosts: expected a whole number"),
        (RECORD | {"per_host": 0}, "per_host: expected a whole number"),
        (RECORD | {"per_host": True}, "per_host: expected a whole number"),
        (RECORD | {"per_host": "2"}, "per_host: expected a whole number"),
        (RECORD | {"per_host": 7}, "is not a multiple"),
        (RECORD | {"native_bf16": 1}, "native_bf16: expected true or false"),
        (RECORD | {"measured": 3}, "measured: expected an object"),
        (RECORD | {"measured": {"step_seconds": "1"}}, "measured.step_seconds: expected"),
        (RECORD | {"measured": {"step_seconds": float("inf")}}, "Infinity is not a JSON number"),
        (RECORD | {"measured": {"step_seconds": 0}}, "measured.step_seconds: expected"),
    ],
)
def test_a_record_that_no_run_leaves(content: Any, said: str, tmp_path: Path) -> None:
    folder = record(tmp_path / "run", content)
    with pytest.raises(ConfigError, match=rf"(?s)--calibrate {folder / 'plan.json'}: .*{said}"):
        read_run(folder)


def test_a_record_of_units_that_the_device_lacks(tmp_path: Path) -> None:
    folder = record(tmp_path / "run", RECORD)
    config = json.loads((folder / "config.json").read_text())
    config["training"]["precision"] = "fp16"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"plan\.json: (?s:.*)a cpu has no units for fp16"):
        read_run(folder)


@pytest.mark.parametrize("faster", [0.5, 1.0, 3.0])
def test_a_calibrated_cpu_has_shares_up_to_1_and_the_same_seconds(
    faster: float, tmp_path: Path
) -> None:
    run = shipped("smoke", "training.precision=fp32")
    plan = make_plan(run, world_size=2, device="cpu")
    seconds = step_seconds(run, plan, Cluster(CPU, 1, 2)).total / faster
    folder = record(tmp_path / "run", RECORD | {"measured": {"step_seconds": seconds}})
    told = calibrate([folder])
    shares = {k: v for k, v in told["efficiencies"].items() if k not in ("launch", "latency")}
    assert max(shares.values()) <= 1
    made = make_device(json.loads(json.dumps(told)))
    assert made.kind == "cpu"
    fitted = dataclasses.replace(CPU, efficiencies=_fit([kept := read_run(folder)], CPU))
    assert kept.predicted(made) == pytest.approx(kept.predicted(fitted), rel=1e-9)
    found = forecast(run, Cluster(made, 1, 2))
    assert found.seconds.total == pytest.approx(seconds, rel=0.1)
    assert found.mfu < 1
    if faster > 1:
        assert made.fp32 is not None
        assert made.fp32 > 50e9


# ---- what is written


def test_a_target_is_a_file_that_is_not_read(tmp_path: Path) -> None:
    source = tmp_path / "run.json"
    source.write_text("{}")
    (tmp_path / "soft.json").symlink_to(source)
    os.link(source, tmp_path / "hard.json")
    (tmp_path / "other.json").symlink_to(tmp_path / "gone.json")
    check_target(tmp_path / "new.json", [source])
    check_target(source)
    before = sorted(tmp_path.iterdir())
    for name, said in (
        *((name, "is read here") for name in ("run.json", "soft.json", "hard.json")),
        ("other.json", "is a link; name the file itself"),
        ("nosuch/x.json", "there is no folder"),
        ("", "no file; name a file"),
        ("x" * 250, "cannot be written"),
    ):
        with pytest.raises(CommandError, match=said):
            check_target(tmp_path / name, [source])
    assert sorted(tmp_path.iterdir()) == before


def test_the_search_keeps_the_users_files(tmp_path: Path) -> None:
    base, own = tmp_path / "base.json", tmp_path / "own-1x1-h100-80gb.json"
    base.write_text((ROOT / "configs" / "1b.json").read_text())
    own.write_text(json.dumps({"extends": "base.json", "name": "own"}))
    asked = ("--config", own, "--gpus-per-node", 1, "--search")
    kept = [path.read_text() for path in (base, own)]
    done = command("plan", *asked, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["written"] is None
    assert told["own"]["rank"] >= 1
    assert sorted(tmp_path.iterdir()) == [base, own]
    for output in (("--output", base), ("--output", own)):
        done = command("plan", *asked, *output, folder=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "which is read here; name another file" in done.stderr
    assert [path.read_text() for path in (base, own)] == kept
    for best in ("best.json", "best.yaml"):
        done = command("plan", *asked, "--output", best, folder=tmp_path)
        assert f"rank 1 is written to {best}" in done.stdout
        assert load_config(tmp_path / best).name == "own"
        done = command("plan", *asked, "--output", best, folder=tmp_path)
        assert done.returncode == 0, "an earlier search's file is written again"
    assert (tmp_path / "best.yaml").read_text().startswith("extends: ")
    (tmp_path / "notes.txt").write_text("mine\n")
    done = command("plan", *asked, "--output", "notes.txt", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "it is there, and no run file that extends" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", LORA, "--output", "x.json"], "--output needs --search or --calibrate"),
        (["--calibrate", "x", "--search"], "--calibrate reads only runs; remove --search"),
        (["--calibrate", "x", "--config", LORA], "omit --config"),
        (
            ["--calibrate", "x", "--output", "no/x.json"],
            "--output no/x.json: there is no folder no",
        ),
        (["--config", LORA, "--nodes", 0], "--nodes 0: give 1"),
    ],
)
def test_a_command_line_that_would_be_ignored(
    arguments: list[Any], said: str, tmp_path: Path
) -> None:
    done = command("plan", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_names_no_model_is_planned_for_an_example(tmp_path: Path) -> None:
    done = command("plan", "--config", LORA, "--gpus-per-node", 1, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "names no model: planning for a model with vocab_size 32000" in done.stderr
    assert json.loads(done.stdout)["parameters"] > 10**9


@pytest.mark.parametrize("launcher", ["pretrain", "finetune"])
@pytest.mark.parametrize("ranks", ["-1", "0", "-3", "1.5", "many"])
def test_a_dry_run_has_a_rank_or_more(launcher: str, ranks: str, tmp_path: Path) -> None:
    done = command(launcher, "--config", LORA, "--dry-run", ranks, folder=tmp_path)
    assert done.returncode == 2
    assert f"--dry-run: ranks, at least 1, not '{ranks}'" in done.stderr
