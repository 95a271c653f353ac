"""The search for a run's fastest layout that fits: every layout is forecast."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megalite.config import RunConfig, allowed_tensor_sizes, merged, parse_config, read_object
from megalite.errors import ConfigError
from megalite.plan.forecast import Forecast, forecast
from megalite.plan.seconds import Cluster
from megalite.plan.zero import zero_settings

_RECOMPUTE = ("none", "selective", "full")
_MOST = 128  # samples of a micro-batch that are tried, in addition to the run file's own


@dataclass(frozen=True)
class Candidate:
    """A layout: the keys of a run file that make it, and its forecast."""

    changes: dict[str, Any]
    forecast: Forecast


@dataclass(frozen=True)
class Ranking:
    """All layouts of a run that fit, and the place of its own layout among them.

    Attributes:
        candidates: the best layouts, fastest first; at most as many as requested.
        fitting: how many layouts fit.
        own: the run file's own layout; None if it cannot be planned.
        own_rank: its place, 1 for the fastest; None if it does not fit.
        fault: why the run file's own layout cannot be planned, else "".
    """

    candidates: list[Candidate]
    fitting: int
    own: Candidate | None
    current_rank: int | None
    fault: str

    def as_json(self, steps: int) -> dict[str, Any]:
        """Return the candidates and the run file's own layout for `--json`."""
        own = None
        if self.own is not None:
            place = {"rank": self.current_rank, "fitting": self.fitting}
            own = place | self.own.changes | self.own.forecast.as_json(steps)
        rows = [row.changes | row.forecast.as_json(steps) for row in self.candidates]
        return {"candidates": rows, "own": own}


def search(config: RunConfig, cluster: Cluster, most: int = 50) -> list[Candidate]:
    """Return the candidates of `rank`."""
    return rank(config, cluster, most).candidates


def rank(config: RunConfig, cluster: Cluster, most: int = 50) -> Ranking:
    """Rank the layouts that fit, fastest first; equally fast ones by the memory they leave.

    Tensor parallelism within a host (with and without sequence parallelism), ZeRO stages, every
    micro-batch that divides a rank's samples, recompute, and the optimizer on the host; among them
    the run file's own layout.

    Raises:
        ConfigError: no layout can be planned, whatever it takes; of the run file's own, else what
            most of them have.
    """
    found: list[Candidate] = []
    planned = 0
    faults = Counter[str]()
    for changes in _changes(config, cluster):
        try:
            made = forecast(_changed(config, changes), cluster)
        except ConfigError as error:  # what does not divide
            faults[str(error)] += 1
            continue
        planned += 1
        if made.fits:
            found.append(Candidate(changes, made))
    if not planned:
        forecast(config, cluster)  # says what is wrong with the run file's own
        raise ConfigError(faults.most_common(1)[0][0])
    found.sort(key=lambda c: (-_rate(c.forecast), -c.forecast.free))
    own = None
    fault = ""
    try:
        own = Candidate(_own_changes(config), forecast(config, cluster))
    except ConfigError as error:
        fault = str(error)
    place = None
    if own is not None and own.forecast.fits:
        faster = [c for c in found if _rate(c.forecast) > _rate(own.forecast)]
        place = 1 + sum(_is_valid(config, candidate) for candidate in faster)
    best = list(itertools.islice(filter(partial(_is_valid, config), found), most))
    return Ranking(best, len(found), own, place, fault)


def _rate(found: Forecast) -> float:
    """Return tokens a second in seven digits; layouts that are equal in them are equally fast."""
    return float(f"{found.tokens_per_second:.6e}")


def _own_changes(config: RunConfig) -> dict[str, Any]:
    """Return the run file's own layout in the keys of a candidate."""
    training = config.training
    own = zero_settings(config)
    device = "cpu" if own.offloads_optimizer else "none"
    zero = {"stage": own.stage, "offload_optimizer": {"device": device}}
    again = training.activation_checkpointing
    return {
        "parallel": {"tensor": config.parallel.tensor, "sequence": config.parallel.sequence},
        "training": {
            "micro_batch_size": training.micro_batch_size,
            "activation_checkpointing": again,
        },
        "deepspeed": {"zero_optimization": zero},
    }


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Return a changed run file. Its rules are not checked, which takes longer than a forecast."""
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=changes["parallel"]),
            "training": config.training.model_copy(update=changes["training"]),
            "deepspeed": merged(config.deepspeed, changes["deepspeed"]),
        }
    )


def _is_valid(config: RunConfig, candidate: Candidate) -> bool:
    """Return whether a layout keeps the rules of a run file."""
    try:
        parse_config(merged(config.model_dump(mode="json"), candidate.changes))
    except ConfigError:
        return False
    return True


def _changes(config: RunConfig, cluster: Cluster) -> Iterator[dict[str, Any]]:
    within = {n for n in allowed_tensor_sizes(config.model) if cluster.per_host % n == 0}
    tensor = sorted(within | {config.parallel.tensor})
    offload = [False] if cluster.device.kind == "cpu" else [False, True]
    for size, stage, again, host in itertools.product(tensor, (0, 1, 2, 3), _RECOMPUTE, offload):
        zero: dict[str, Any] = {"stage": stage}
        if stage == 0 and host:
            continue
        zero["offload_optimizer"] = {"device": "cpu" if host else "none"}
        sequences = (False, True) if size > 1 else (False,)
        for batch, sequence in itertools.product(_micro(config, cluster, size), sequences):
            yield {
                "parallel": {"tensor": size, "sequence": sequence},
                "training": {"micro_batch_size": batch, "activation_checkpointing": again},
                "deepspeed": {"zero_optimization": zero},
            }


def _micro(config: RunConfig, cluster: Cluster, tensor: int) -> list[int]:
    """Return the micro-batches that divide a rank's samples of a step."""
    training = config.training
    ranks = cluster.hosts * cluster.per_host // tensor
    samples, rest = divmod(training.global_batch_size, max(1, ranks))
    if rest:
        return []
    tried = {*range(1, _MOST + 1), training.micro_batch_size}
    return [size for size in sorted(tried) if samples and samples % size == 0]


def run_file(
    candidate: Candidate, path: Path, source: Path, changes: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of a run file at `path` that extends `source` by a candidate.

    Args:
        changes: what the command line changes, as sections.
    """
    parent = os.path.relpath(source.resolve(), path.resolve().parent)
    return {"extends": parent, **merged(changes, candidate.changes)}


def extends(path: Path, source: Path) -> bool:
    """Return whether a file is a run file that extends `source`, as an earlier search writes it."""
    try:
        parent = read_object(path).get("extends")
    except (OSError, ConfigError):
        return False
    return isinstance(parent, str) and (path.parent / parent).resolve() == source.resolve()
