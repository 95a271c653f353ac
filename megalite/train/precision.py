"""Resolution of `precision: auto`, on which all ranks agree and which a resume keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megalite import files
from megalite.config import Precision, parse_config, zero_stage
from megalite.env import Launch
from megalite.errors import ConfigError, UserError
from megalite.formats import checkpoint as disk
from megalite.log import logger
from megalite.parallel import Grid
from megalite.plan import (
    Plan,
    bf16_units,
    legacy_auto_precision,
    recorded_precision,
    resolve_precision,
)
from megalite.train.checks import hardware_faults
from megalite.train.options import RunOptions, device_kind, plan_of


def agree_on_precision(options: RunOptions, launch: Launch, grid: Grid) -> tuple[RunOptions, Plan]:
    """Return the options with "auto" resolved, and their plan; a collective of all ranks.

    A resumed run keeps the precision of its checkpoint, on other hardware too. A fresh run uses
    bf16 if every rank has hardware units for it.

    Raises:
        ConfigError: on every rank, if ZeRO stage 0 does not support the checkpoint's precision.
        UserError: on every rank, if the hardware of a rank does not support the precision.
    """
    resolved = _resolve(options, grid)
    plan = plan_of(resolved, launch)
    faults = list[str]()
    if plan.precision != plan_of(options, launch).precision:  # checked before with another one
        faults = hardware_faults(resolved.config, plan, launch, device_kind())
    all_faults = [fault for local in grid.all_gather_objects(faults) for fault in local]
    if all_faults:
        raise UserError("\n".join(dict.fromkeys(all_faults)))
    return resolved, plan


def _resolve(options: RunOptions, grid: Grid) -> RunOptions:
    requested = options.config.training.precision
    if options.engine == "reference":
        return _with(options, Precision.FP32, "the reference engine's")
    resumes = grid.rank == 0 and options.resume != "never"
    facts = grid.all_gather_objects((bf16_units(), _recorded(options) if resumes else None))
    units: tuple[str | None, ...] = tuple(unit for unit, _ in facts)
    device = device_kind()
    recorded: Precision | Literal["auto"] | None = facts[0][1]
    previous = legacy_auto_precision(device) if recorded == "auto" else recorded
    native_bf16 = all(units)
    if requested != "auto":
        _warn_if_slow(requested, device, native_bf16)
        return options
    best = resolve_precision(options.config, device=device, native_bf16=native_bf16)
    if previous not in (None, Precision.FP32) and zero_stage(options.config) == 0:
        raise ConfigError(
            f"training.precision auto: the run began in {previous} and keeps it, but ZeRO stage 0 "
            "has no fp32 master weights; set deepspeed.zero_optimization.stage to 1, or change "
            "the precision with --set training.precision=fp32"
        )
    precision = previous or best
    if previous and previous != best:
        logger.info(
            "the run keeps the precision of its checkpoint, %s; %s is faster on this hardware: "
            "--set training.precision=%s changes it",
            previous,
            best,
            best,
        )
    _warn_if_slow(precision, device, native_bf16)
    reason = "as its checkpoint" if previous else _reason(best, device, units)
    return _with(options, precision, reason)


def _with(options: RunOptions, precision: Precision, reason: str) -> RunOptions:
    raw = options.config.model_dump(mode="json")
    raw["training"]["precision"] = precision.value
    return replace(options, config=parse_config(raw), precision_reason=reason)


def _recorded(options: RunOptions) -> Precision | Literal["auto"] | None:
    """Return the precision of the checkpoint that a resume will most likely use."""
    for folder in _candidates(options):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            return recorded_precision(files.read_json(folder / "config.json"), folder.parents[1])
    return None


def _candidates(options: RunOptions) -> Iterator[Path]:
    if options.resume != "auto":
        path = Path(options.resume)
        yield path
        yield from disk.published(path / "checkpoints")
        yield from disk.published(path)
    yield from disk.published(options.root)


def _reason(precision: Precision, device: str, units: tuple[str | None, ...]) -> str:
    if device == "cuda":
        return "auto on GPUs"
    if precision is Precision.BF16:
        return f"auto: every rank has {' or '.join(sorted({unit for unit in units if unit}))}"
    if all(units):
        return "auto: ZeRO stage 0 has no fp32 master weights"
    lacking = sum(unit is None for unit in units)
    return f"auto: {lacking} of {len(units)} ranks lack AMX and AVX512-BF16"


def _warn_if_slow(precision: str, device: str, native_bf16: bool) -> None:
    if precision == Precision.BF16 and device == "cpu" and not native_bf16:
        logger.warning(
            "training.precision bf16: a processor of this run has neither AMX nor AVX512-BF16, so "
            "a step takes about twice as long as in fp32; set training.precision to fp32"
        )
