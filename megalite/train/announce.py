"""The first words of a start: what it trains, what it goes on from, and what has changed."""

from __future__ import annotations

import json
from typing import Any

from megalite import env
from megalite.checkpoint import Place
from megalite.config import RunConfig
from megalite.data import Samples
from megalite.log import logger
from megalite.observe import Recorder, last_layout
from megalite.parallel import Grid
from megalite.plan import Plan
from megalite.train.checks import remarks
from megalite.train.request import Request
from megalite.train.resume import Origin


def announce(
    request: Request,
    plan: Plan,
    grid: Grid,
    train: Samples,
    origin: Origin | None,
    place: Place,
    recorder: Recorder,
) -> None:
    """Report this start to the log, and as an event."""
    config = request.config
    logger.info(
        "%s: %s parameters, %s, ZeRO-%d, %d x data, %d x tensor, %d x %d tokens a step, %s",
        config.name,
        _count(plan.parameters),
        request.named_precision,
        plan.zero_stage,
        plan.data_parallel,
        plan.tensor_parallel,
        plan.global_batch_size,
        plan.sequence_length,
        grid.device.type,
    )
    for remark in remarks(config, plan):
        logger.info("%s", remark)
    facts: dict[str, Any] = {
        "world_size": plan.world_size,
        "zero_stage": plan.zero_stage,
        "layout": _layout(config, plan, grid),
        "data": train.describe(plan.global_batch_size * config.training.steps),
    }
    if origin is None or origin.weights_only:
        if origin:
            logger.info("a fresh run from the weights of %s", origin.folder)
            facts |= {"init_from": str(origin.folder), "changes": origin.changes}
            facts["init_name"] = request.init_name or request.init_from
        recorder.event(place.step, "start", **facts)
        return
    # rank 0 alone reports: the records of a long run are not read once a rank
    before = last_layout(origin.folder.parent.parent) if grid.rank == 0 else {}
    _announce_resume(config, origin, place, recorder, facts, before)


def _announce_resume(
    config: RunConfig,
    origin: Origin,
    place: Place,
    recorder: Recorder,
    facts: dict[str, Any],
    layout: dict[str, Any],
) -> None:
    """Report the checkpoint that a run goes on from, and all that has changed since.

    Args:
        layout: of the run's last start, on rank 0.
    """
    logger.info("resumed from %s", origin.folder)
    if place.step >= config.training.steps:
        more = "finetune.epochs" if config.finetune else "training.steps"
        logger.info(
            "all of its steps are done, and an evaluation that is left follows; for more steps "
            "raise %s, or choose another name",
            more,
        )
    changes = origin.changes | _moved(layout, facts["layout"])
    _report(changes)
    before, after = origin.rates or (0.0, 0.0)
    if before != after and place.step < config.training.steps:
        logger.info("learning rate of step %d: %.3g -> %.3g", place.step + 1, before, after)
        facts["lr"] = {"before": before, "after": after}
    recorder.event(
        place.step,
        "resume",
        path=str(origin.folder),
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
    """Return how the run is laid out over its ranks, by the names a user knows."""
    return {
        "ranks": plan.world_size,
        "tensor": plan.tensor_parallel,
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
