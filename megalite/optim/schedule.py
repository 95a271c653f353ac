"""The learning rate as a function of the step, without state to save."""

from __future__ import annotations

import math

from megalite.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1.

    All schedules rise linearly to `optimizer.lr` over `warmup_steps`.

        cosine, linear    fall to `min_lr_ratio` x `optimizer.lr` over `decay_steps`, then stay
        constant          stays
        wsd               stays, then falls linearly over the last `decay_steps` of the run
                          (warmup, stable, decay: Hu et al. 2024)
    """
    schedule = config.schedule
    peak = config.optimizer.lr
    total = config.training.steps
    warmup, floor = schedule.warmup_steps, schedule.min_lr_ratio
    if step <= warmup:
        return peak * step / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "wsd":
        decay = schedule.decay_steps or max(1, min(total // 10, total - warmup))
        begin = total - decay
    else:
        decay = schedule.decay_steps or max(1, total - warmup)
        begin = warmup
    progress = min(max((step - begin) / decay, 0.0), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return peak * (floor + (1 - floor) * shape)
