"""Report of a start: what it trains, what it goes on from, and what has changed."""

from __future__ import annotations

import json
from typing import Any

from megalite import env
from megalite.checkpoint import Progress
from megalite.config import RunConfig
from megalite.data import Samples
from megalite.log import logger
from megalite.observe import Recorder, last_layout, unknown_utilization
from megalite.parallel import Grid
from megalite.plan import Plan
from megalite.train.checks import remarks
from megalite.train.options import RunOptions
from megalite.train.resume import ResumePoint


def announce(
    options: RunOptions,
    *,
    plan: Plan,
    grid: Grid,
    train: Samples,
    resume_point: ResumePoint | None,
    progress: Progress,
    recorder: Recorder,
) -> None:
    """Report this start to the log, and as an event."""
    config = options.config
    logger.info(
        "%s",
        f"{config.name}: {_count(plan.parameters)} parameters, {options.named_precision}, "
        f"ZeRO-{plan.zero_stage}, {grid.mesh.data} x data, {grid.mesh.tensor} x tensor, "
        f"{plan.global_batch_size} x {plan.sequence_length} tokens a step, {grid.device.type}",
    )
    for remark in [*remarks(config, plan), *unknown_utilization(grid.device, plan.precision)]:
        logger.info("%s", remark)
    facts: dict[str, Any] = {
        "world_size": plan.world_size,
        "zero_stage": plan.zero_stage,
        "layout": _layout(config, plan, grid),
        "data": train.describe(plan.global_batch_size * config.training.steps),
    }
    if resume_point is None or resume_point.weights_only:
        if resume_point:
            logger.info("a fresh run from the weights of %s", resume_point.folder)
            facts |= {"init_from": str(resume_point.folder), "changes": resume_point.changes}
            facts["init_name"] = options.init_name or options.init_from
        recorder.event(progress.step, "start", **facts)
        return
    # only rank 0 reports, so only rank 0 reads the records of what may be a long run
    layout = last_layout(resume_point.folder.parent.parent) if grid.rank == 0 else {}
    _announce_resume(
        config,
        resume_point=resume_point,
        progress=progress,
        recorder=recorder,
        facts=facts,
        layout=layout,
    )


def _announce_resume(
    config: RunConfig,
    *,
    resume_point: ResumePoint,
    progress: Progress,
    recorder: Recorder,
    facts: dict[str, Any],
    layout: dict[str, Any],
) -> None:
    """Report the checkpoint that a run goes on from, and all that has changed since.

    Args:
        facts: fields of the event.
        layout: layout of the run's last start, on rank 0.
    """
    logger.info("resumed from %s", resume_point.folder)
    if progress.step >= config.training.steps:
        more = "finetune.epochs" if config.finetune else "training.steps"
        logger.info(
            "all of its steps are done, and an evaluation that is left follows; for more steps "
            "raise %s, or choose another name",
            more,
        )
    changes = resume_point.changes | _moved(layout, facts["layout"])
    _report(changes)
    before, after = resume_point.rates or (0.0, 0.0)
    if before != after and progress.step < config.training.steps:
        logger.info("learning rate of step %d: %.3g -> %.3g", progress.step + 1, before, after)
        facts["lr"] = {"before": before, "after": after}
    recorder.event(
        progress.step,
        "resume",
        path=str(resume_point.folder),
        job=env.job().id or None,
        changes=changes,
        **facts,
    )


def _report(changes: dict[str, Any]) -> None:
    for key, change in changes.items():
        both = isinstance(change, dict)
        logger.info(
            "changed since: %s: %s",
            key,
            f"{_text(change['before'])} -> {_text(change['after'])}" if both else change,
        )


def _count(number: int) -> str:
    """Return a number of parameters with its unit: 7.3 M, 12.5 K."""
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number / 1e3:.1f} K"


def _layout(config: RunConfig, plan: Plan, grid: Grid) -> dict[str, Any]:
    """Return how the run is laid out over its ranks, by the names of a run file."""
    return {
        "ranks": plan.world_size,
        "tensor": grid.mesh.tensor,
        "sequence": config.parallel.sequence,
        "ZeRO stage": plan.zero_stage,
        "micro_batch_size": plan.micro_batch_size,
        "device": grid.device.type,
    }


def _moved(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the differences of two layouts; a start of an older version recorded none."""
    return {
        key: {"before": before[key], "after": value}
        for key, value in after.items()
        if key in before and before[key] != value
    }


def _text(value: Any) -> str:
    """Return a value as a run file shows it."""
    return value if isinstance(value, str) else json.dumps(value)
