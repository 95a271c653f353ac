# covers: megalite/plan/devices.py
"""Inputs of the planner: device files, records of runs, and impossible command lines."""

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
        ("[]", r"expected one JSON object \{\.\.\.\}, got \[\]"),
        ("{", "line 1 column 2: not JSON"),
        ("[" * 5000, "more than 30 deep"),
        ('{"extends": "cpu", "link": NaN}', "NaN is not a JSON number"),
        ('{"extends": "cpu", "link": 1e400}', "out of range; write a number"),
        ('{"extends": "cpu", "memory": 9' + "9" * 30 + "}", "out of range"),
        ('{"extends": "cpu", "extends": "h100"}', '"extends" occurs twice'),
        ('{"extends": "h101"}', r'extends: "h101": no such device; did you mean "h100"\?'),
        ('{"extends": 5}', "extends: 5: no such device; choose one of b200"),
        ('{"memory": 85899345920}', 'extends: is missing; .*"h100-80gb", or add name, kind'),
        ('{"extends": "cpu", "memry": 1}', r'"memry": unknown key; did you mean "memory"\?'),
        ('{"extends": "cpu", "kind": "cuda"}', '"kind": unknown key'),
        (
            '{"extends": "h100", "memory": 80}',
            r"memory: expected .* bytes \(80 GiB are .* got 80",
        ),
        ('{"extends": "h100", "memory": true}', "memory: .* got true"),
        ('{"extends": "h100", "link": 1e-30}', r"link: expected .* bytes/s, got 1e-30"),
        ('{"extends": "h100", "bf16": 989}', r"bf16: expected .* FLOP/s .* got 989"),
        ('{"extends": "h100", "link": null}', "link: expected .* got null"),
        ('{"extends": "v100-sxm2", "fp16": null, "fp32": null}', "all are null"),
        ('{"extends": "cpu", "efficiencies": 1}', "expected an object of shares"),
        ('{"extends": "cpu", "efficiencies": {"matmul": 1.3}}', r"matmul: expected 1e-06 to 1, "),
        ('{"extends": "cpu", "efficiencies": {"matmull": 1}}', 'did you mean "matmul"'),
        ('{"extends": "cpu", "name": "my/gpu"}', "name: .* cannot be a file name"),
        ('{"extends": "cpu", "name": "a\\u001b[1m"}', "name: .* cannot be a file name"),
        ('{"extends": "cpu", "name": ""}', "name: .* cannot be a file name"),
        ('{"extends": "cpu", "name": 5}', "name: expected text"),
        ('{"extends": "cpu", "native_bf16": 1}', "native_bf16: expected true or false, got 1"),
    ],
)
def test_device_file_faults_are_reported(content: str, said: str, tmp_path: Path) -> None:
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
def test_auto_precision_follows_the_planned_device(
    device: dict[str, Any], stage: int, expected: str
) -> None:
    run = shipped("smoke", "training.precision=auto", f"deepspeed.zero_optimization.stage={stage}")
    assert forecast(run, Cluster(make_device(device), 1, 2)).plan.precision == expected


def test_native_bf16_defaults_to_the_devices_kind() -> None:
    optional = ("efficiencies", "native_bf16")
    for device in (CPU, DEVICES["h100"]):
        whole = {key: value for key, value in vars(device).items() if key not in optional}
        assert make_device(whole) == device


@pytest.mark.parametrize("native", [True, False])
def test_calibrated_cpu_records_its_native_bf16(native: bool, tmp_path: Path) -> None:
    folder = record(tmp_path / "run", RECORD | {"native_bf16": native})
    assert make_device(calibrate([folder])).native_bf16 is native


def test_find_device_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.json")
    with pytest.raises(CommandError, match="not a regular file"):
        find_device(str(tmp_path / "mine.json"))
    with pytest.raises(CommandError, match="no such file"):
        find_device(str(tmp_path / "none.json"))


def test_device_file_takes_its_kind_from_extends_and_any_name() -> None:
    named = make_device({"extends": "H100-80GB", "name": "cpu", "bf16": None})
    assert (named.kind, named.bf16, named.fp16) == ("cuda", None, DEVICES["h100"].fp16)
    laptop = make_device({"extends": "cpu", "name": "laptop"})
    run = shipped("smoke")
    one, other = (forecast(run, Cluster(device, 1, 2)) for device in (laptop, CPU))
    assert one.as_json(1) == other.as_json(1)
    whole = {key: value for key, value in vars(CPU).items() if key != "efficiencies"}
    assert make_device(whole) == CPU


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("Tesla V100-SXM2-16GB", None, "v100-sxm2-16gb"),
        ("Tesla V100-SXM2-32GB", None, "v100-sxm2"),
        ("NVIDIA A100-SXM-64GB", None, None),
        ("NVIDIA GH200 480GB", None, "gh200-480gb"),
        ("NVIDIA H100 80GB HBM3", 85_029_158_912, "h100-80gb"),
        ("NVIDIA A100-SXM4-80GB", 64 << 30, None),
    ],
)
def test_driver_name_and_memory_select_a_device(
    name: str, memory: int | None, expected: str | None
) -> None:
    device = by_driver_name(name, memory)
    assert (device and device.name) == expected


# ---- forecasts


def test_unsupported_precision_error_lists_supported_ones() -> None:
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
def test_search_without_a_possible_layout_raises_the_fault(
    device: str, hosts: int, sets: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        search(shipped("1b", *sets), Cluster(DEVICES[device], hosts, 8))


def test_table_fits_the_terminal_with_one_row_per_message_kind() -> None:
    tiny = dataclasses.replace(DEVICES["h100"], memory=80)
    run = shipped("70b", "parallel.tensor=8")
    text = describe_forecast(run, forecast(run, Cluster(tiny, 16, 8)))
    assert max(len(line) for line in text.splitlines() if "#" in line) == 80
    assert "#>" in text
    sent = [line.split()[:3] for line in text.partition("messages per step")[2].splitlines()[1:]]
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
        ("[" * 5000, "more than 30 deep"),
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
def test_damaged_plan_json_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    folder = record(tmp_path / "run", content)
    with pytest.raises(ConfigError, match=rf"(?s)--calibrate {folder / 'plan.json'}: .*{said}"):
        read_run(folder)


def test_plan_json_with_an_unsupported_precision_is_refused(tmp_path: Path) -> None:
    folder = record(tmp_path / "run", RECORD)
    config = json.loads((folder / "config.json").read_text())
    config["training"]["precision"] = "fp16"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"plan\.json: (?s:.*)a cpu has no units for fp16"):
        read_run(folder)


@pytest.mark.parametrize("faster", [0.5, 1.0, 3.0])
def test_calibrated_cpu_has_efficiencies_up_to_1_and_the_measured_seconds(
    faster: float, tmp_path: Path
) -> None:
    run = shipped("smoke", "training.precision=fp32")
    plan = make_plan(run, world_size=2, device="cpu")
    seconds = step_seconds(run, plan, Cluster(CPU, 1, 2)).total / faster
    folder = record(tmp_path / "run", RECORD | {"measured": {"step_seconds": seconds}})
    report = calibrate([folder])
    shares = {k: v for k, v in report["efficiencies"].items() if k not in ("launch", "latency")}
    assert max(shares.values()) <= 1
    device = make_device(json.loads(json.dumps(report)))
    assert device.kind == "cpu"
    fitted = dataclasses.replace(CPU, efficiencies=_fit([measured := read_run(folder)], CPU))
    assert measured.predicted(device) == pytest.approx(measured.predicted(fitted), rel=1e-9)
    result = forecast(run, Cluster(device, 1, 2))
    assert result.seconds.total == pytest.approx(seconds, rel=0.1)
    assert result.mfu < 1
    if faster > 1:
        assert device.fp32 is not None
        assert device.fp32 > 50e9


# ---- output files


def test_output_must_not_be_an_input_file(tmp_path: Path) -> None:
    source = tmp_path / "run.json"
    source.write_text("{}")
    (tmp_path / "soft.json").symlink_to(source)
    os.link(source, tmp_path / "hard.json")
    (tmp_path / "other.json").symlink_to(tmp_path / "gone.json")
    check_target(tmp_path / "new.json", [source])
    check_target(source)
    before = sorted(tmp_path.iterdir())
    for name, said in (
        *((name, "it is the input") for name in ("run.json", "soft.json", "hard.json")),
        ("other.json", "is a link; name the file itself"),
        ("nosuch/x.json", "there is no folder"),
        ("", "it exists and is not a file; name another file"),
        ("x" * 250, "cannot be written"),
    ):
        with pytest.raises(CommandError, match=said):
            check_target(tmp_path / name, [source])
    assert sorted(tmp_path.iterdir()) == before


def test_search_does_not_overwrite_user_files(tmp_path: Path) -> None:
    base, run_file = tmp_path / "base.json", tmp_path / "own-1x1-h100-80gb.json"
    base.write_text((ROOT / "configs" / "1b.json").read_text())
    run_file.write_text(json.dumps({"extends": "base.json", "name": "own"}))
    arguments = ("--config", run_file, "--gpus-per-node", 1, "--search")
    before = [path.read_text() for path in (base, run_file)]
    done = command("plan", *arguments, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["written"] is None
    assert report["own"]["rank"] >= 1
    assert sorted(tmp_path.iterdir()) == [base, run_file]
    for output in (("--output", base), ("--output", run_file)):
        done = command("plan", *arguments, *output, folder=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "it is the input" in done.stderr
    assert [path.read_text() for path in (base, run_file)] == before
    for best in ("best.json", "best.yaml"):
        done = command("plan", *arguments, "--output", best, folder=tmp_path)
        assert f"rank 1 is written to {best}" in done.stdout
        assert load_config(tmp_path / best).name == "own"
        done = command("plan", *arguments, "--output", best, folder=tmp_path)
        assert done.returncode == 0, "a search may overwrite its own file"
    assert (tmp_path / "best.yaml").read_text().startswith("extends: ")
    (tmp_path / "notes.txt").write_text("mine\n")
    done = command("plan", *arguments, "--output", "notes.txt", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the file exists and does not extend" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", LORA, "--output", "x.json"], "--output needs --search or --calibrate"),
        (["--calibrate", "x", "--search"], "--calibrate reads only runs; remove --search"),
        (["--calibrate", "x", "--config", LORA], "remove --config"),
        (
            ["--calibrate", "x", "--output", "no/x.json"],
            "--output no/x.json: there is no folder no",
        ),
        (["--config", LORA, "--nodes", 0], "--nodes 0: set it to 1"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: list[Any], said: str, tmp_path: Path
) -> None:
    done = command("plan", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_run_file_without_a_model_is_planned_for_an_example(tmp_path: Path) -> None:
    done = command("plan", "--config", LORA, "--gpus-per-node", 1, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "names no model: planning for a model with vocab_size 32000" in done.stderr
    assert json.loads(done.stdout)["parameters"] > 10**9


@pytest.mark.parametrize("launcher", ["pretrain", "finetune"])
@pytest.mark.parametrize("ranks", ["-1", "0", "-3", "1.5", "many"])
def test_dry_run_needs_at_least_one_rank(launcher: str, ranks: str, tmp_path: Path) -> None:
    done = command(launcher, "--config", LORA, "--dry-run", ranks, folder=tmp_path)
    assert done.returncode == 2
    assert f"--dry-run: expected a number of ranks, 1 or more, got '{ranks}'" in done.stderr
