"""The precision that `training.precision: auto` means on a kind of device.

It depends on the run file and on the units of the processors, never on a timing. So every start of
a run, on every rank, gets the same precision. `megalite/train/precision.py` makes the ranks agree
and records the precision in the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from megalite import files
from megalite.config import Precision, RunConfig, zero_stage

# Flags of /proc/cpuinfo for units that multiply bf16 matrices: AMX (Intel), and the dot products of
# AVX-512 (Intel and AMD). Without them bf16 is half as fast as fp32.
_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
_CPUINFO = Path("/proc/cpuinfo")


def bf16_units(cpuinfo: Path = _CPUINFO) -> str | None:
    """Name this host's units for bf16 matrix products: "AMX", "AVX512-BF16", or None."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return None
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return next((name for flag, name in _UNITS.items() if flag in flags), None)


def resolve_precision(
    config: RunConfig, *, device: Literal["cpu", "cuda"], native_bf16: bool | None = None
) -> Precision:
    """Return the precision of a run file, "auto" resolved.

    On GPUs "auto" means bf16. On CPUs it means bf16 if they have units for bf16 and the ZeRO stage
    (1 to 3) keeps fp32 master weights, else fp32.

    Args:
        native_bf16: whether the CPUs have units for bf16. None means that this host decides.
    """
    precision = config.training.precision
    if precision != "auto":
        return Precision(precision)
    if device == "cuda":
        return Precision.BF16
    has_units = bf16_units() is not None if native_bf16 is None else native_bf16
    return Precision.BF16 if has_units and zero_stage(config) > 0 else Precision.FP32


def recorded_precision(config: Mapping[str, Any], run: Path) -> Precision | Literal["auto"] | None:
    """Return the precision in which a checkpoint was trained.

    MegaLite 0.1 recorded "auto" unresolved. Its run folder has the precision in deepspeed.json.

    Args:
        config: the checkpoint's run file, as JSON.
        run: the run folder of the checkpoint.
    Returns:
        "auto" if deepspeed.json is missing as well. None if the name is unknown.
    """
    precision = config["training"]["precision"]
    if precision == "auto":
        with suppress(OSError, ValueError, LookupError, TypeError):
            enabled = files.read_json(run / "deepspeed.json")["bf16"]["enabled"]
            return Precision.BF16 if enabled else Precision.FP32
        return "auto"
    return Precision(precision) if precision in list(Precision) else None


def legacy_auto_precision(device: Literal["cpu", "cuda"]) -> Precision:
    """Return the precision that "auto" meant in MegaLite 0.1."""
    return Precision.BF16 if device == "cuda" else Precision.FP32
