# covers: megalite/plan/forecast.py megalite/plan/seconds.py megalite/plan/traffic.py
# covers: megalite/plan/calibrate.py
"""Forecasts: devices, time, communication, and the command."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megalite.config import Precision, load_config
from megalite.errors import CommandError, ConfigError
from megalite.plan import Collective, data_collectives, make_plan
from megalite.plan.calibrate import calibrate
from megalite.plan.devices import CPU, DEVICES, by_driver_name, find_device
from megalite.plan.forecast import forecast
from megalite.plan.seconds import Cluster, step_seconds
from megalite.plan.tables import describe_forecast

ROOT = Path(__file__).resolve().parents[3]
H100 = DEVICES["h100-80gb"]


def shipped(name: str, *sets: str) -> Any:
    return load_config(ROOT / "configs" / f"{name}.json", sets)


# ---- devices


def test_devices_are_found_by_name_driver_name_and_file(tmp_path: Path) -> None:
    assert find_device("H100-80GB") is H100
    assert find_device("NVIDIA A100-SXM4-80GB") is DEVICES["a100-80gb"]
    assert by_driver_name("cpu") is None
    file = tmp_path / "mine.json"
    device = {"extends": "h100", "name": "mine", "memory": 2**36, "efficiencies": {"matmul": 0.5}}
    file.write_text(json.dumps(device))
    result = find_device(str(file))
    assert (result.name, result.memory, result.bf16) == ("mine", 2**36, H100.bf16)
    assert (result.efficiencies.matmul, result.efficiencies.link) == (0.5, H100.efficiencies.link)


def test_unknown_device_error_suggests_the_nearest_name() -> None:
    assert find_device("rtx4090") is DEVICES["rtx-4090"]
    with pytest.raises(CommandError, match='did you mean "h100-80gb"'):
        find_device("h10-80gb")


# ---- communication


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (1, [("all_reduce", 1), ("all_gather", 1)]),
        (2, [("reduce_scatter", 4 * 23), ("all_gather", 1)]),
        (3, [("reduce_scatter", 4 * 23), ("all_gather", 8 * 23)]),
    ],
)
def test_zero_stages_move_gradients_and_weights(
    stage: int, expected: list[tuple[str, int]]
) -> None:
    run = shipped("1b", f"deepspeed.zero_optimization.stage={stage}")
    ranks = run.training.global_batch_size // run.training.micro_batch_size // 4
    plan = make_plan(run, world_size=ranks, device="cuda")
    counts, moved = Counter[str](), Counter[str]()
    for call in data_collectives(run, plan):
        counts[call.kind] += call.count
        moved[call.kind] += call.bytes
        assert call.dtype == ("bf16" if call.kind == "all_gather" else "fp32")
    assert list(counts.items()) == expected
    passes = {1: (1, 1), 2: (4, 1), 3: (4, 8)}[stage]
    sizes = [times * plan.parameters * size for times, size in zip(passes, (4, 2), strict=True)]
    assert list(moved.values()) == sizes


@pytest.mark.parametrize(
    ("sets", "calls"),
    [
        (("training.precision=fp32", "deepspeed.zero_optimization.stage=0"), 3),
        (("training.precision=fp32",), 23),
        (('deepspeed.zero_optimization={"stage":2,"reduce_bucket_size":1e9}',), 4 * 2),
    ],
)
def test_reductions_fill_their_buckets(sets: tuple[str, ...], calls: int) -> None:
    """1.1e9 gradients, in buckets of 5e8 (stage 0), of 5e7, and of the run file's size."""
    run = shipped("1b", *sets)
    ranks = run.training.global_batch_size // run.training.micro_batch_size // 4
    rows = data_collectives(run, make_plan(run, world_size=ranks, device="cuda"))
    assert (
        sum(call.count for call in rows if call.dtype == "fp32" and call.kind != "all_gather")
        == calls
    )


def test_huge_batches_are_counted_in_closed_form() -> None:
    one, huge = (
        shipped(
            "7b",
            f"training.global_batch_size={4 * n}",
            f"training.micro_batch_size={n}",
            "parallel.tensor=2",
        )
        for n in (1, 10**9)
    )
    sizes = []
    for run in (one, huge):
        result = forecast(run, Cluster(H100, 1, 8))
        sizes.append(sum(call.bytes for call in result.collectives if call.group == "tensor"))
        assert len(describe_forecast(run, result)) < 10_000
    assert sizes[1] == 10**9 * sizes[0]


def test_fine_tuning_forecast_has_no_run_time() -> None:
    run = shipped("finetune/glue_sst2")
    result = forecast(run, Cluster(H100, 1, 1))
    assert result.plan.parameters == 6_264_832
    assert "the run:" not in describe_forecast(run, result)
    report = result.as_json(run.training.steps)
    assert (report["run_seconds"], report["device_hours"]) == (None, None)
    timed = shipped("1b", "training.steps=10")
    assert "the run: 10 steps" in describe_forecast(timed, forecast(timed, Cluster(H100, 1, 8)))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (60, "60 steps, 245.8 thousand tokens, "),
        (10_000, "10,000 steps, 40.96 million tokens, "),
        (10**7, "10,000,000 steps, 40.96 billion tokens, "),
    ],
)
def test_run_size_is_described_in_fitting_units(steps: int, said: str) -> None:
    run = shipped("smoke", "training.precision=fp32", f"training.steps={steps}")
    result = forecast(run, Cluster(CPU, 1, 2))
    line = next(
        one for one in describe_forecast(run, result).splitlines() if one.startswith("the run:")
    )
    assert said in line
    times = re.findall(r"([\d,.]+) (?:device )?(seconds|minutes|hours|days)", line)
    assert len(times) == 2
    assert all(float(number.replace(",", "")) >= 1 for number, _ in times)
    size = result.plan.memory_bytes["total"] / 2**20
    assert f"{size:.0f}" in describe_forecast(run, result)
    assert "0.00 " not in describe_forecast(run, result)


@pytest.mark.parametrize("name", ["smoke", "125m", "1b", "7b", "70b"])
@pytest.mark.parametrize("device", ["cpu", "h100-80gb"])
def test_forward_is_no_slower_than_backward(name: str, device: str) -> None:
    run = shipped(name, "training.precision=fp32", "training.global_batch_size=1024")
    result = forecast(run, Cluster(DEVICES[device], 4, 8))
    assert result.seconds.forward <= result.seconds.backward
    assert result.mfu < 0.65


def test_ring_collectives_send_all_but_the_ranks_part() -> None:
    call = Collective("data", "all_reduce", Precision.BF16, 1000, 3)
    assert call.bytes == 6000
    assert call.sent_bytes(4) == 2 * 6000 * 3 / 4
    assert dataclasses.replace(call, kind="all_gather").sent_bytes(4) == 6000 * 3 / 4


# ---- time


def test_time_follows_work_devices_and_networks() -> None:
    stage_1 = "deepspeed.zero_optimization.stage=1"
    run, eight = shipped("7b", stage_1), Cluster(H100, 4, 8)
    base = forecast(run, eight)
    assert 0.3 < base.mfu < 0.6
    deeper = forecast(shipped("7b", stage_1, "model.num_hidden_layers=64"), eight)
    assert 1.8 < deeper.seconds.total / base.seconds.total < 2.1
    slow = dataclasses.replace(H100, network=H100.network / 100)
    assert forecast(run, Cluster(slow, 4, 8)).seconds.data > 20 * base.seconds.data
    again = (stage_1, "training.activation_checkpointing=full")
    full = forecast(shipped("7b", *again), eight)
    assert full.seconds.backward > base.seconds.backward
    assert full.hardware_flops_per_token > full.plan.flops_per_token
    longer = step_seconds(run, base.plan, eight, document_tokens=100)
    assert longer.forward < base.seconds.forward


def test_time_follows_trained_weights_and_predicted_tokens() -> None:
    """Adapters save the gradients of frozen weights; labels and short texts save logits."""
    cluster, one = (
        Cluster(H100, 1, 1),
        ("training.global_batch_size=8", "training.micro_batch_size=8"),
    )
    base = shipped("1b").model.model_dump(mode="json", exclude={"adapter", "classifier_pooling"})
    sft, lora = (
        forecast(
            load_config(ROOT / "configs" / "finetune" / f"{name}.json", one, model=base), cluster
        )
        for name in ("sft", "lora")
    )
    assert 0.6 < lora.plan.flops_per_token / sft.plan.flops_per_token < 0.75
    assert lora.seconds.backward < 0.8 * sft.seconds.backward
    assert lora.mfu < 1.1 * sft.mfu
    many = [key.replace("=8", "=256") for key in one]
    text = forecast(shipped("finetune/imdb_text", *many), cluster)
    label = forecast(shipped("finetune/imdb", *many), cluster)
    both = [one.seconds.forward + one.seconds.backward for one in (label, text)]
    assert both[0] < 0.9 * both[1]
    assert label.plan.memory_bytes["logits"] < 10_000


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 ranks share a model, but a host has 4"):
        forecast(shipped("70b", "parallel.tensor=8"), Cluster(H100, 16, 4))
    with pytest.raises(ConfigError, match="a v100-sxm2 has no units for bf16"):
        forecast(shipped("1b"), Cluster(DEVICES["v100-sxm2"], 1, 8))
    with pytest.raises(ConfigError, match=r"parallel\.tensor: 3 does not divide"):
        forecast(shipped("1b", "parallel.tensor=3"), Cluster(H100, 1, 8))
    with pytest.raises(ConfigError, match="is not a multiple of micro_batch_size"):
        forecast(shipped("1b"), Cluster(H100, 1000, 8))


# ---- the command


def command(*arguments: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "launcher" / "plan.py"), *map(str, arguments)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def test_command_reports_memory_time_and_fit(tmp_path: Path) -> None:
    arguments = ("--config", ROOT / "configs" / "7b.json", "--nodes", 4, "--json")
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] is True
    assert report["parameters"] == 6_738_415_616
    names = ["parameters", "gradients", "optimizer", "activations", "logits", "buffers", "total"]
    assert list(report["memory_bytes"]) == names
    assert report["tokens_per_second"] == pytest.approx(4096 * 1024 / report["step_seconds"])
    small = command(*arguments[:2], "--gpus-per-node", 1, "--gpu", "rtx-4090", folder=tmp_path)
    assert small.returncode == 1
    assert "it does not fit" in small.stdout
    assert list(tmp_path.iterdir()) == []


def test_command_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as leaving: assert leaving.code == 0\n"
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    )
    line = f"import sys; sys.argv = sys.argv[1:]\n{code}"
    path = str(ROOT / "configs" / "7b.json")
    script = str(ROOT / "launcher" / "plan.py")
    arguments = [sys.executable, "-c", line, script, "--config", path, "--nodes", "4"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_calibration_reproduces_the_step_times_of_runs(tmp_path: Path) -> None:
    runs, device = (
        [],
        dataclasses.replace(
            DEVICES["cpu"],
            efficiencies=dataclasses.replace(
                DEVICES["cpu"].efficiencies, matmul=0.4, bandwidth=1.5
            ),
        ),
    )
    for number, sets in enumerate((["training.micro_batch_size=1"], ["parallel.tensor=2"])):
        run = shipped("smoke", *sets)
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(run.model_dump(mode="json")))
        cluster = Cluster(device, 1, 2)
        plan = make_plan(run, world_size=2, device="cpu")
        seconds = step_seconds(run, plan, cluster).total
        record = {"device": "cpu", "hosts": 1, "per_host": 2}
        measured = {"step_seconds": seconds, "memory_bytes": 1}
        (folder / "plan.json").write_text(json.dumps(record | {"measured": measured}))
        runs.append((folder, run, seconds))
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(calibrate([folder for folder, _, _ in runs])))
    fitted = find_device(str(file))
    for _, run, seconds in runs:
        assert forecast(run, Cluster(fitted, 1, 2)).seconds.total == pytest.approx(seconds, rel=0.1)
    with pytest.raises(CommandError, match=r"it contains no plan\.json"):
        calibrate([tmp_path])


def test_forecast_is_printed_as_a_table() -> None:
    run = shipped(
        "7b", "parallel.tensor=4", "deepspeed.zero_optimization.offload_optimizer.device=cpu"
    )
    text = describe_forecast(run, forecast(run, Cluster(H100, 4, 8)))
    words = (
        "on 4 x 8 h100-80gb",
        "it fits",
        "in host memory: offload_optimizer",
        "tensor all_reduce",
    )
    assert [word for word in words if word not in text] == []
