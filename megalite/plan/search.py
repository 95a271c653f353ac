"""Which layout of a run is the fastest that fits: every one is forecast."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megalite.config import RunConfig, allowed_tensor_parallel, merged, parse_config
from megalite.errors import ConfigError
from megalite.plan.forecast import Forecast, forecast
from megalite.plan.seconds import Layout

_RECOMPUTE = ("none", "selective", "full")
_MOST = 128  # samples of a micro-batch that are tried, beside the run file's own


@dataclass(frozen=True)
class Candidate:
    """A layout, by the keys of a run file that make it, and what is to be expected of it."""

    changes: dict[str, Any]
    forecast: Forecast


def search(config: RunConfig, layout: Layout, most: int = 50) -> list[Candidate]:
    """The best layouts that fit, the fastest first; of equal ones that which leaves more memory.

    Tensor parallelism within a host (with and without sequence parallelism), ZeRO stages, every
    micro-batch that divides a rank's samples, recompute, and the optimizer on the host; among them
    the run file's own layout.

    Raises:
        ConfigError: no layout can be planned, whatever it takes; of the run file's own, else what
            most of them have.
    """
    found: list[Candidate] = []
    planned, faults = 0, Counter[str]()
    for changes in _changes(config, layout):
        try:
            made = forecast(_changed(config, changes), layout)
        except ConfigError as error:  # what does not divide
            faults[str(error)] += 1
            continue
        planned += 1
        if made.fits:
            found.append(Candidate(changes, made))
    if not planned:
        forecast(config, layout)  # says what is wrong with the run file's own
        raise ConfigError(faults.most_common(1)[0][0])
    # seven digits of a rate: what is equal in them is equal
    found.sort(key=lambda c: (-float(f"{c.forecast.tokens_per_second:.6e}"), -c.forecast.free))
    return list(itertools.islice(filter(partial(_is_valid, config), found), most))


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Without the rules of a run file, which take longer than a forecast."""
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=changes["parallel"]),
            "training": config.training.model_copy(update=changes["training"]),
            "deepspeed": merged(config.deepspeed, changes["deepspeed"]),
        }
    )


def _is_valid(config: RunConfig, candidate: Candidate) -> bool:
    """Whether a layout keeps the rules of a run file."""
    try:
        parse_config(merged(config.model_dump(mode="json"), candidate.changes))
    except ConfigError:
        return False
    return True


def _changes(config: RunConfig, layout: Layout) -> Iterator[dict[str, Any]]:
    within = {n for n in allowed_tensor_parallel(config.model) if layout.per_host % n == 0}
    tensor = sorted(within | {config.parallel.tensor})
    offload = [False] if layout.device.kind == "cpu" else [False, True]
    for size, stage, again, host in itertools.product(tensor, (0, 1, 2, 3), _RECOMPUTE, offload):
        zero: dict[str, Any] = {"stage": stage}
        if stage == 0 and host:
            continue
        zero["offload_optimizer"] = {"device": "cpu" if host else "none"}
        sequences = (False, True) if size > 1 else (False,)
        for batch, sequence in itertools.product(_micro(config, layout, size), sequences):
            yield {
                "parallel": {"tensor": size, "sequence": sequence},
                "training": {"micro_batch_size": batch, "activation_checkpointing": again},
                "deepspeed": {"zero_optimization": zero},
            }


def _micro(config: RunConfig, layout: Layout, tensor: int) -> list[int]:
    """The micro-batches that divide a rank's samples of a step."""
    training, ranks = config.training, layout.hosts * layout.per_host // tensor
    samples, rest = divmod(training.global_batch_size, max(1, ranks))
    if rest:
        return []
    tried = {*range(1, _MOST + 1), training.micro_batch_size}
    return [size for size in sorted(tried) if samples and samples % size == 0]


def run_file(
    candidate: Candidate, path: Path, source: Path, changes: dict[str, Any]
) -> dict[str, Any]:
    """What a run file at `path` says that extends `source` by a candidate.

    Args:
        changes: what the command line changes, as sections.
    """
    extends = os.path.relpath(source.resolve(), path.resolve().parent)
    return {"extends": extends, **merged(changes, candidate.changes)}
