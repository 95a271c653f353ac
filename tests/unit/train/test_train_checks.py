# covers: megalite/train/checks.py
"""Hardware checks: all faults are reported before anything is allocated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from megalite import env
from megalite.config import Precision, RunConfig
from megalite.env import Launch
from megalite.plan import Plan, make_plan
from megalite.train import checks
from tests.helpers.models import run_config

GIB = 2**30


def launch_of(ranks: int, local: int) -> Launch:
    return Launch(0, ranks, 0, local, "127.0.0.1", 1, "torchrun")


def plan_of(config: RunConfig, gib: float) -> Plan:
    plan = make_plan(config, world_size=1, device="cpu")
    sizes = dict.fromkeys(plan.memory_bytes, 0) | {"optimizer": int(gib * GIB)}
    return replace(plan, memory_bytes=sizes | {"total": int(gib * GIB)})


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the free memory of the host in GiB."""

    def set_free(gib: float) -> None:
        monkeypatch.setattr(checks, "available_memory", lambda: int(gib * GIB))

    return set_free


def test_memory_check_accepts_a_plan_that_fits(free: Any) -> None:
    free(4)
    config = run_config()
    assert checks.hardware_faults(config, plan_of(config, 4), launch_of(1, 1), "cpu") == []


def test_memory_fault_lists_the_parts(free: Any) -> None:
    free(3.9)
    config = run_config(name="big")
    (fault,) = checks.hardware_faults(config, plan_of(config, 4), launch_of(1, 1), "cpu")
    assert fault.startswith("memory: big needs about 4.0 GiB for 1 ranks (optimizer 4.0 GiB")
    assert "3.9 GiB are free on this host" in fault


def test_memory_check_counts_the_ranks_of_this_host(free: Any) -> None:
    free(9)
    config = run_config()
    plan = plan_of(config, 4)
    assert checks.hardware_faults(config, plan, launch_of(8, 2), "cpu") == []
    (fault,) = checks.hardware_faults(config, plan, launch_of(8, 4), "cpu")
    assert "16.0 GiB for 4 ranks" in fault


def test_memory_check_reads_the_gpu_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[int] = []

    def mem_get_info(index: int) -> tuple[int, int]:
        devices.append(index)
        return 3 * GIB, 80 * GIB

    fake = SimpleNamespace(mem_get_info=mem_get_info, device_count=lambda: 4)
    monkeypatch.setattr(torch, "cuda", fake)
    config = run_config()
    launch = Launch(5, 8, 1, 4, "h", 1, "torchrun")
    assert checks.hardware_faults(config, plan_of(config, 2.5), launch, "cuda") == []
    (fault,) = checks.hardware_faults(config, plan_of(config, 3.5), launch, "cuda")
    assert "3.0 GiB are free on its GPU" in fault
    assert devices == [1, 1]


def test_memory_check_of_an_offloaded_optimizer_counts_host_memory(
    free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(mem_get_info=lambda _: (80 * GIB, 80 * GIB), device_count=lambda: 4)
    monkeypatch.setattr(torch, "cuda", fake)
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    config, launch = run_config(deepspeed=offload), Launch(0, 4, 0, 4, "h", 1, "torchrun")
    plan = plan_of(config, 5)
    free(20)
    assert checks.hardware_faults(config, plan, launch, "cuda") == []
    free(19)
    (fault,) = checks.hardware_faults(config, plan, launch, "cuda")
    assert "4 ranks need 20.0 GiB of host memory (offload_optimizer 5.0 GiB a rank)" in fault
    assert "but 19.0 GiB are free on this host" in fault


def test_memory_check_counts_the_snapshot_of_a_background_save(free: Any) -> None:
    config = run_config(checkpoint={"background": True})
    plan = make_plan(config, world_size=2, device="cpu")
    snapshot = -(-12 * plan.parameters // 2)
    free((plan.memory_bytes["total"] + snapshot) * 2 / GIB)
    assert checks.hardware_faults(config, plan, launch_of(2, 2), "cpu") == []
    free(((plan.memory_bytes["total"] + snapshot) * 2 - 2) / GIB)
    assert len(checks.hardware_faults(config, plan, launch_of(2, 2), "cpu")) == 1


def test_hardware_faults_are_all_reported(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free(1)
    monkeypatch.setattr(env, "has_compiler", lambda: False)
    config = run_config(training={"compile": True})
    plan = replace(plan_of(config, 2), precision=Precision.FP16)
    faults = checks.hardware_faults(config, plan, launch_of(2, 2), "cpu")
    words = ("training.precision fp16", "training.compile true", "memory:")
    assert len(faults) == len(words)
    assert all(any(word in fault for fault in faults) for word in words)
    monkeypatch.setattr(env, "has_compiler", lambda: True)
    assert len(checks.hardware_faults(config, plan, launch_of(2, 2), "cpu")) == 2


def test_deepspeed_section_that_needs_a_missing_package_or_gpu_is_refused(
    free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(64)
    monkeypatch.setattr(env, "has_package", lambda name: name == "tensorboard")
    section: dict[str, Any] = {
        "comet": {"enabled": True},
        "wandb": {"enabled": False},
        "tensorboard": {"enabled": True},
        "zero_optimization": {"stage": 3, "zero_quantized_weights": True},
    }
    config = run_config(deepspeed=section)
    plan = plan_of(config, 2)
    launch = launch_of(2, 2)
    faults = checks.hardware_faults(config, plan, launch, "cpu")
    assert [fault.partition(":")[0] for fault in faults] == [
        "deepspeed.comet",
        "deepspeed.zero_optimization.zero_quantized_weights",
    ]
    assert "comet_ml is not installed" in faults[0]
    assert "set it to false" in faults[1]


def limits(monkeypatch: pytest.MonkeyPatch, folder: Path, **contents: str) -> None:
    """Simulate a control group (version 2) with files of `contents`, and a host with 64 GiB free.

    Underscores in names stand for dots.
    """
    for name, content in contents.items():
        (folder / name.replace("_", ".")).write_text(content)
    pair = (str(folder / "memory.max"), str(folder / "memory.current"))
    monkeypatch.setattr(checks, "_CGROUP_LIMITS", (pair,))
    host = SimpleNamespace(available=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)


@pytest.mark.parametrize(
    ("maximum", "current", "gib"),
    [(24, 4, 20), (200, 4, 64), (24, 25, 0)],
)
def test_available_memory_is_within_the_limit_of_the_control_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, maximum: int, current: int, gib: int
) -> None:
    contents = {"memory_max": f"{maximum * GIB}\n", "memory_current": f"{current * GIB}\n"}
    limits(monkeypatch, tmp_path, **contents)
    assert checks.available_memory() == gib * GIB


def test_available_memory_without_a_limit_is_that_of_the_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits(monkeypatch, tmp_path)
    assert checks.available_memory() == 64 * GIB
    limits(monkeypatch, tmp_path, memory_max="max\n", memory_current=f"{GIB}\n")
    assert checks.available_memory() == 64 * GIB


def test_available_memory_includes_cached_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A control group counts 18 GiB of shards in the page cache as used."""
    statistics = (
        f"anon {2 * GIB}\nfile {18 * GIB}\nactive_file {3 * GIB}\ninactive_file {15 * GIB}\n"
    )
    contents = {"memory_max": f"{24 * GIB}\n", "memory_current": f"{20 * GIB}\n"}
    limits(monkeypatch, tmp_path, **contents, memory_stat=statistics)
    assert checks.available_memory() >= 19 * GIB


def test_missing_package_of_a_sink_is_reported_with_its_command(
    free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(4)
    monkeypatch.setattr(checks.env, "has_package", lambda name: False)
    for mode, count in (("online", 1), ("disabled", 0)):
        sinks = {"wandb": {"project": "mine", "mode": mode}, "tensorboard": False}
        config = run_config(logging=sinks)
        faults = checks.hardware_faults(config, plan_of(config, 1), launch_of(1, 1), "cpu")
        assert len(faults) == count
        assert all('install it with `pip install -e ".[wandb]"`' in fault for fault in faults)
    config = run_config(logging={"tensorboard": True})
    [fault] = checks.hardware_faults(config, plan_of(config, 1), launch_of(1, 1), "cpu")
    assert fault.startswith("logging.tensorboard: the package tensorboard is not installed")
