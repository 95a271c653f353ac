"""What `precision: auto` is: a function of the processor's flags and the run file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalite.config import parse_config
from megalite.plan import bf16_units, make_plan, recorded_precision, resolve_precision
from tests.run_file import BASE


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


def test_a_host_without_cpuinfo_has_no_known_units(tmp_path: Path) -> None:
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


def test_a_named_precision_is_kept_on_every_device() -> None:
    for bf16 in (True, False):
        assert resolve_precision(config("fp32"), device="cpu", native_bf16=bf16) == "fp32"
        assert resolve_precision(config("bf16"), device="cpu", native_bf16=bf16) == "bf16"


@pytest.mark.parametrize(
    ("precision", "deepspeed", "recorded"),
    [
        ("bf16", {}, "bf16"),
        ("auto", {"bf16.enabled": False, "fp16.enabled": False}, "fp32"),
        ("auto", {"fp16.enabled": False}, "bf16"),
        ("auto", {}, "fp32"),
        ("fp64", {}, None),
    ],
)
def test_checkpoints_that_say_auto_tell_it_by_their_record(
    precision: str, deepspeed: dict[str, Any], recorded: str | None
) -> None:
    assert recorded_precision({"training": {"precision": precision}}, deepspeed) == recorded
