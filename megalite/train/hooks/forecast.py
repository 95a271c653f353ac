"""Forecast of a run's memory and time, compared with measurements at its end."""

from __future__ import annotations

import socket
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megalite import files
from megalite.config import RunConfig
from megalite.errors import ConfigError
from megalite.log import logger
from megalite.observe import Recorder, peak_memory_bytes
from megalite.parallel import Grid
from megalite.plan import Plan, bf16_units
from megalite.plan.calibrate import RECORD
from megalite.plan.devices import Device, by_driver_name, guess_cpu
from megalite.plan.forecast import forecast
from megalite.plan.seconds import Cluster
from megalite.train.hooks.hook import Hook

_WARM_UP = 2  # first rows, in which the run compiles, allocates and reads for the first time


class ForecastCheck(Hook):
    """Forecast from before the engine is built, compared with measurements at the run's end.

    All ranks must construct it, because they exchange the names of their hosts. On a CPU, measured
    memory is the increase since the construction, and predicted times are guesses until
    `megalite plan --calibrate` has measured the host.

    Args:
        recorder: writer of the run's records. Its rank 0 reports.
        longest: tokens of the longest training sample, if all may be shorter than
            data.sequence_length.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        plan: Plan,
        grid: Grid,
        recorder: Recorder,
        longest: int | None = None,
    ) -> None:
        config = _as_run(config, plan, longest)
        host = socket.gethostname()
        hosts = grid.all_gather_objects(host)
        self._grid = grid
        self._recorder = recorder
        self._predicted: dict[str, Any] | None = None
        self._baseline = 0 if grid.device.type == "cuda" else peak_memory_bytes(grid.device)
        device = _device(grid)
        if device is None:
            return
        cluster = Cluster(device, len(set(hosts)), hosts.count(host))
        with suppress(ConfigError):  # such as tensor parallelism over hosts
            predicted = forecast(config, cluster)
            self._record: dict[str, Any] = {
                "device": device.name,
                "hosts": cluster.hosts,
                "per_host": cluster.per_host,
                "native_bf16": device.native_bf16,
                "baseline_bytes": self._baseline,
            }
            self._predicted = {
                # a GPU's allocator reports tensors alone; a CPU's process includes the overhead
                "memory_bytes": predicted.plan.memory_bytes["total"]
                + (predicted.overhead if grid.device.type == "cpu" else 0),
                "step_seconds": predicted.seconds.total,
            }

    def close(self) -> None:
        """Log predictions and measurements, and write them to plan.json, on rank 0."""
        recorder = self._recorder
        if recorder.rank != 0 or self._predicted is None:
            return
        peak = peak_memory_bytes(self._grid.device)  # includes the last evaluation and save
        measured = _measured(recorder.folder, recorder.attempt, self._baseline, peak)
        if measured is None:
            return
        predicted = self._predicted
        logger.info(
            "memory of a rank: %.2f GiB predicted, %.2f measured; %s",
            predicted["memory_bytes"] / 2**30,
            measured["memory_bytes"] / 2**30,
            f"a step: {predicted['step_seconds']:.3g} s predicted"
            f"{' (a guess for a CPU)' if self._record['device'] == 'cpu' else ''}, "
            f"{measured['step_seconds']:.3g} measured",
        )
        record = self._record | {"predicted": predicted, "measured": measured}
        with suppress(OSError):
            files.write_json(recorder.folder / RECORD, record)


def _device(grid: Grid) -> Device | None:
    if grid.device.type != "cuda":
        return guess_cpu(bf16_units() is not None)
    properties = torch.cuda.get_device_properties(grid.device)
    return by_driver_name(properties.name, properties.total_memory)


def _as_run(config: RunConfig, plan: Plan, longest: int | None) -> RunConfig:
    """Return the run file with the resolved precision and the actual length of its samples."""
    training = config.training.model_copy(update={"precision": plan.precision})
    config = config.model_copy(update={"training": training})
    if longest is None or config.model.architecture == "encoder_decoder":
        return config
    length = min(config.data.sequence_length, -(-longest // 8) * 8)
    data = config.data.model_copy(update={"sequence_length": length})
    return config.model_copy(update={"data": data})


def _measured(folder: Path, attempt: int, baseline: int, peak: int) -> dict[str, Any] | None:
    """Return median step time and peak memory of a start, or None if there are too few rows.

    Args:
        baseline: bytes to subtract from the peak.
        peak: peak memory of this rank until now, in bytes.
    """
    try:
        rows = files.read_rows(folder / "metrics.jsonl")
    except OSError:
        return None
    steps = [row for row in rows if row.get("kind") == "train" and row.get("attempt") == attempt]
    times = [row["step_seconds"] for row in steps[_WARM_UP:] if row.get("step_seconds")]
    if not times:
        return None
    most = max(peak, *(row.get("peak_memory_bytes") or 0 for row in steps))
    return {
        "memory_bytes": max(0, most - baseline),
        "step_seconds": statistics.median(times),
    }
