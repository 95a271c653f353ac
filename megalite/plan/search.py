"""Search for a run's fastest layout that fits, by a forecast of every layout."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megalite.config import (
    RunConfig,
    allowed_tensor_sizes,
    merged,
    parse_config,
    read_strict_object,
)
from megalite.errors import ConfigError
from megalite.plan.forecast import Forecast, forecast
from megalite.plan.seconds import Cluster
from megalite.plan.zero import zero_settings

_RECOMPUTE = ("none", "selective", "full")
_MAX_MICRO_BATCH = 128  # the run file's own may be larger


@dataclass(frozen=True)
class Candidate:
    """A layout, as changes of a run file, and its forecast."""

    changes: dict[str, Any]
    forecast: Forecast


@dataclass(frozen=True)
class Ranking:
    """The layouts of a run that fit, and the rank of its current layout among them.

    Attributes:
        candidates: the requested number of layouts, fastest first.
        fitting: number of layouts that fit.
        current: layout of the run file. None if it cannot be planned.
        current_rank: rank of the current layout, 1 for the fastest. None if it does not fit.
        fault: reason why the current layout cannot be planned, else "".
    """

    candidates: list[Candidate]
    fitting: int
    current: Candidate | None
    current_rank: int | None
    fault: str

    def as_json(self, steps: int) -> dict[str, Any]:
        """Return the candidates and the current layout for `--json`."""
        current = None
        if self.current is not None:
            rank = {"rank": self.current_rank, "fitting": self.fitting}
            current = rank | self.current.changes | self.current.forecast.as_json(steps)
        rows = [row.changes | row.forecast.as_json(steps) for row in self.candidates]
        return {"candidates": rows, "own": current}


def search(config: RunConfig, cluster: Cluster, limit: int = 50) -> list[Candidate]:
    """Return the candidates of `rank`."""
    return rank(config, cluster, limit).candidates


def rank(config: RunConfig, cluster: Cluster, limit: int = 50) -> Ranking:
    """Rank the layouts that fit, fastest first. Among equally fast ones, more free memory wins.

    The layouts vary tensor parallelism within a host, sequence parallelism, ZeRO stage, every
    micro-batch size that divides a rank's samples, recomputation, and optimizer offload. The
    current layout is one of them.

    Args:
        limit: number of candidates to return.
    Raises:
        ConfigError: no layout can be planned. The message is the fault of the current layout, else
            the most frequent one.
    """
    fitting: list[Candidate] = []
    planned = 0
    faults = Counter[str]()
    for changes in _changes(config, cluster):
        try:
            candidate = Candidate(changes, forecast(_changed(config, changes), cluster))
        except ConfigError as error:  # sizes that do not divide
            faults[str(error)] += 1
            continue
        planned += 1
        if candidate.forecast.fits:
            fitting.append(candidate)
    if not planned:
        forecast(config, cluster)  # raises the fault of the current layout, if it has one
        raise ConfigError(faults.most_common(1)[0][0])
    fitting.sort(key=lambda c: (-_speed(c.forecast), -c.forecast.free))
    current = None
    fault = ""
    try:
        current = Candidate(_current_layout(config), forecast(config, cluster))
    except ConfigError as error:
        fault = str(error)
    current_rank = None
    if current is not None and current.forecast.fits:
        faster = [c for c in fitting if _speed(c.forecast) > _speed(current.forecast)]
        current_rank = 1 + sum(_is_valid(config, candidate) for candidate in faster)
    best = list(itertools.islice(filter(partial(_is_valid, config), fitting), limit))
    return Ranking(best, len(fitting), current, current_rank, fault)


def _speed(result: Forecast) -> float:
    """Return tokens per second to seven digits, so that rounding does not rank layouts."""
    return float(f"{result.tokens_per_second:.6e}")


def _current_layout(config: RunConfig) -> dict[str, Any]:
    """Return the layout of the run file as a candidate's changes."""
    training = config.training
    settings = zero_settings(config)
    device = "cpu" if settings.offloads_optimizer else "none"
    zero = {"stage": settings.stage, "offload_optimizer": {"device": device}}
    return {
        "parallel": {"tensor": config.parallel.tensor, "sequence": config.parallel.sequence},
        "training": {
            "micro_batch_size": training.micro_batch_size,
            "activation_checkpointing": training.activation_checkpointing,
        },
        "deepspeed": {"zero_optimization": zero},
    }


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Return a changed run file, unchecked: checking its rules takes longer than a forecast."""
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=changes["parallel"]),
            "training": config.training.model_copy(update=changes["training"]),
            "deepspeed": merged(config.deepspeed, changes["deepspeed"]),
        }
    )


def _is_valid(config: RunConfig, candidate: Candidate) -> bool:
    """Return whether a layout follows the rules of run files."""
    try:
        parse_config(merged(config.model_dump(mode="json"), candidate.changes))
    except ConfigError:
        return False
    return True


def _changes(config: RunConfig, cluster: Cluster) -> Iterator[dict[str, Any]]:
    """Yield all layouts, as changes of the run file."""
    within = {n for n in allowed_tensor_sizes(config.model) if cluster.per_host % n == 0}
    tensor = sorted(within | {config.parallel.tensor})
    offload = [False] if cluster.device.kind == "cpu" else [False, True]
    for size, stage, recompute, host in itertools.product(
        tensor, (0, 1, 2, 3), _RECOMPUTE, offload
    ):
        zero: dict[str, Any] = {"stage": stage}
        if stage == 0 and host:
            continue
        zero["offload_optimizer"] = {"device": "cpu" if host else "none"}
        sequences = (False, True) if size > 1 else (False,)
        sizes = _micro_batches(config, cluster, size)
        for batch, sequence in itertools.product(sizes, sequences):
            yield {
                "parallel": {"tensor": size, "sequence": sequence},
                "training": {"micro_batch_size": batch, "activation_checkpointing": recompute},
                "deepspeed": {"zero_optimization": zero},
            }


def _micro_batches(config: RunConfig, cluster: Cluster, tensor: int) -> list[int]:
    """Return the micro-batch sizes that divide a rank's samples of a step."""
    training = config.training
    ranks = cluster.hosts * cluster.per_host // tensor
    samples, rest = divmod(training.global_batch_size, max(1, ranks))
    if rest:
        return []
    sizes = {*range(1, _MAX_MICRO_BATCH + 1), training.micro_batch_size}
    return [size for size in sorted(sizes) if samples and samples % size == 0]


def run_file(
    candidate: Candidate, path: Path, source: Path, changes: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of a run file at `path` that extends `source` by a candidate.

    Args:
        changes: changes of the command line, as sections.
    """
    parent = os.path.relpath(source.resolve(), path.resolve().parent)
    return {"extends": parent, **merged(changes, candidate.changes)}


def extends(path: Path, source: Path) -> bool:
    """Return whether a file is a run file that extends `source`, such as an earlier search's."""
    try:
        parent = read_strict_object(path).get("extends")
    except (OSError, ConfigError):
        return False
    return isinstance(parent, str) and (path.parent / parent).resolve() == source.resolve()
