"""The precision that `precision: auto` stands for in this run: agreed, recorded, and kept."""

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
    auto_of_first_version,
    bf16_units,
    recorded_precision,
    resolve_precision,
)
from megalite.train.checks import hardware_faults
from megalite.train.options import RunOptions, device_kind, plan_of


def settle_precision(options: RunOptions, launch: Launch, grid: Grid) -> tuple[RunOptions, Plan]:
    """Return the options with "auto" written out, and its plan; a collective of all ranks.

    A run that goes on keeps the precision of its checkpoint, on other hardware too. A fresh run
    takes bf16 if every rank has units for it.

    Raises:
        ConfigError: the kept precision is not possible in this ZeRO stage; on every rank.
        UserError: the hardware of a rank cannot run the settled precision; on every rank.
    """
    settled = _settle(options, grid)
    plan = plan_of(settled, launch)
    faults = list[str]()
    if plan.precision != plan_of(options, launch).precision:  # the check was of another precision
        faults = hardware_faults(settled.config, plan, launch, device_kind())
    every = [fault for own in grid.all_gather_objects(faults) for fault in own]
    if every:
        raise UserError("\n".join(dict.fromkeys(every)))
    return settled, plan


def _settle(options: RunOptions, grid: Grid) -> RunOptions:
    asked = options.config.training.precision
    if options.engine == "reference":
        return _with(options, Precision.FP32, "the reference engine's")
    goes_on = grid.rank == 0 and options.resume != "never"
    known = grid.all_gather_objects((bf16_units(), _recorded(options) if goes_on else None))
    units: tuple[str | None, ...] = tuple(unit for unit, _ in known)
    device = device_kind()
    recorded: Precision | Literal["auto"] | None = known[0][1]
    kept = auto_of_first_version(device) if recorded == "auto" else recorded
    able = all(units)
    if asked != "auto":
        _warn_of_slow(asked, device, able)
        return options
    best = resolve_precision(options.config, device=device, native_bf16=able)
    if kept not in (None, Precision.FP32) and zero_stage(options.config) == 0:
        raise ConfigError(
            f"training.precision auto: the run began in {kept} and goes on in it, but ZeRO stage 0 "
            "keeps no fp32 master weights; set deepspeed.zero_optimization.stage to 1, or change "
            "the precision with --set training.precision=fp32"
        )
    precision = kept or best
    if kept and kept != best:
        logger.info(
            "the run goes on in %s, as its checkpoint; %s is faster on this hardware: "
            "--set training.precision=%s changes it",
            kept,
            best,
            best,
        )
    _warn_of_slow(precision, device, able)
    reason = "as its checkpoint" if kept else _reason(best, device, units)
    return _with(options, precision, reason)


def _with(options: RunOptions, precision: Precision, reason: str) -> RunOptions:
    raw = options.config.model_dump(mode="json")
    raw["training"]["precision"] = precision.value
    return replace(options, config=parse_config(raw), precision_reason=reason)


def _recorded(options: RunOptions) -> Precision | Literal["auto"] | None:
    """Return the precision of the checkpoint that a resume will most likely go on from."""
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
        return "auto: ZeRO stage 0 keeps no fp32 masters"
    lacking = sum(unit is None for unit in units)
    return f"auto: {lacking} of {len(units)} ranks lack AMX and AVX512-BF16"


def _warn_of_slow(precision: str, device: str, able: bool) -> None:
    if precision == Precision.BF16 and device == "cpu" and not able:
        logger.warning(
            "training.precision bf16: a processor of this run has neither AMX nor AVX512-BF16; a "
            "step takes about twice as long as in fp32"
        )
