"""Report of a start: its model and layout, its checkpoint, and the changes since then."""

from __future__ import annotations

import json
from typing import Any

from megalite import env
from megalite.checkpoint import Progress
from megalite.config import RunConfig
from megalite.data import Samples
from megalite.log import logger
from megalite.observe import Recorder, last_layout, mfu_warnings
from megalite.parallel import Grid
from megalite.plan import Plan
from megalite.train.checks import hints
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
    """Report this start in the log and as an event."""
    config = options.config
    logger.info(
        "%s",
        f"{config.name}: {_count(plan.parameters)} parameters, {options.named_precision}, "
        f"ZeRO-{plan.zero_stage}, {grid.mesh.data} x data, {grid.mesh.tensor} x tensor, "
        f"{plan.global_batch_size} x {plan.sequence_length} tokens a step, {grid.device.type}",
    )
    steps = config.training.steps
    tokens = "" if config.finetune else f", {steps * plan.tokens_per_step:,} tokens"
    logger.info("%s", f"the run: {steps:,} steps{tokens}")
    for hint in [*hints(config, plan), *mfu_warnings(grid.device, plan.precision)]:
        logger.info("%s", hint)
    facts: dict[str, Any] = {
        "world_size": plan.world_size,
        "zero_stage": plan.zero_stage,
        "layout": _layout(config, plan, grid),
        "data": train.describe(plan.global_batch_size * steps),
    }
    if resume_point is None or resume_point.weights_only:
        if resume_point:
            logger.info("a fresh run from the weights of %s", resume_point.folder)
            facts |= {"init_from": str(resume_point.folder), "changes": resume_point.changes}
            facts["init_name"] = options.init_name or options.init_from
        recorder.event(progress.step, "start", **facts)
        return
    # only rank 0 reports, so only rank 0 reads the run's records, which may be long
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
    """Report the checkpoint that a run resumes from, and all changes since then.

    Args:
        facts: fields of the event.
        layout: layout of the run's last start, on rank 0.
    """
    logger.info("resumed from %s", resume_point.folder)
    if progress.step >= config.training.steps:
        more = "finetune.epochs" if config.finetune else "training.steps"
        logger.info(
            "all steps of the run are done, and only a pending evaluation follows; to train "
            "more steps, raise %s, or choose another name",
            more,
        )
    changes = resume_point.changes | _layout_changes(layout, facts["layout"])
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
        is_pair = isinstance(change, dict)
        logger.info(
            "changed since the checkpoint: %s: %s",
            key,
            f"{_text(change['before'])} -> {_text(change['after'])}" if is_pair else change,
        )


def _count(number: int) -> str:
    """Return a number of parameters with its unit: 7.3 M, 12.5 K."""
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number / 1e3:.1f} K"


def _layout(config: RunConfig, plan: Plan, grid: Grid) -> dict[str, Any]:
    """Return the layout of the run, with names as in a run file."""
    return {
        "ranks": plan.world_size,
        "tensor": grid.mesh.tensor,
        "sequence": config.parallel.sequence,
        "ZeRO stage": plan.zero_stage,
        "micro_batch_size": plan.micro_batch_size,
        "device": grid.device.type,
    }


def _layout_changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the differences of two layouts. Older versions recorded no layout."""
    return {
        key: {"before": before[key], "after": value}
        for key, value in after.items()
        if key in before and before[key] != value
    }


def _text(value: Any) -> str:
    """Return a value as it is written in a run file."""
    return value if isinstance(value, str) else json.dumps(value)
