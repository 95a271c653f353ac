# covers: megalite/config/precision.py megalite/plan/precision.py
"""`precision: auto` follows from the processor's flags and the run file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.config import parse_config
from megalite.plan import (
    bf16_units,
    legacy_auto_precision,
    make_plan,
    recorded_precision,
    resolve_precision,
)
from tests.helpers.runs import BASE


def config(precision: str, stage: int = 1) -> Any:
    zero = {"zero_optimization": {"stage": stage}}
    return parse_config(
        BASE | {"training": BASE["training"] | {"precision": precision}, "deepspeed": zero}
    )


@pytest.mark.parametrize(
    ("flags", "units"),
    [
        ("fpu avx512f avx512_bf16 amx_bf16 amx_tile", "AMX"),
        ("fpu avx512f avx512_bf16", "AVX512-BF16"),
        ("fpu avx512f avx512_vnni", None),
        ("fpu amx_int8 avx512_bf16_not", None),
    ],
)
def test_bf16_units_are_read_from_the_flags(tmp_path: Path, flags: str, units: str | None) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: amx_bf16\nflags\t\t: {flags}\nbugs\t: x\n")
    assert bf16_units(path) == units


def test_hosts_without_cpuinfo_have_no_bf16_units(tmp_path: Path) -> None:
    assert bf16_units(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("device", "bf16", "stage", "precision"),
    [
        ("cuda", False, 1, "bf16"),
        ("cpu", True, 1, "bf16"),
        ("cpu", True, 2, "bf16"),
        ("cpu", True, 3, "bf16"),
        ("cpu", True, 0, "fp32"),
        ("cpu", False, 1, "fp32"),
    ],
)
def test_auto_follows_device_and_stage(device: Any, bf16: bool, stage: int, precision: str) -> None:
    auto = config("auto", stage)
    assert resolve_precision(auto, device=device, native_bf16=bf16) == precision
    assert make_plan(auto, world_size=1, device=device, native_bf16=bf16).precision == precision


def test_named_precision_applies_on_every_device() -> None:
    for bf16 in (True, False):
        assert resolve_precision(config("fp32"), device="cpu", native_bf16=bf16) == "fp32"
        assert resolve_precision(config("bf16"), device="cpu", native_bf16=bf16) == "bf16"


@pytest.mark.parametrize(
    ("precision", "bf16", "recorded"),
    [
        ("bf16", False, "bf16"),
        ("auto", False, "fp32"),
        ("auto", True, "bf16"),
        ("auto", None, "auto"),
        ("fp64", True, None),
    ],
)
def test_checkpoints_with_auto_take_the_precision_of_deepspeed_json(
    tmp_path: Path, precision: str, bf16: bool | None, recorded: str | None
) -> None:
    if bf16 is not None:
        (tmp_path / "deepspeed.json").write_text(json.dumps({"bf16": {"enabled": bf16}}))
    assert recorded_precision({"training": {"precision": precision}}, tmp_path) == recorded


def test_auto_in_version_0_1_followed_the_device() -> None:
    assert [legacy_auto_precision(device) for device in ("cpu", "cuda")] == ["fp32", "bf16"]
