"""Efficiencies of a machine, fitted to the step times of runs on it (`plan.json`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.config import RunConfig, load_stored, read_strict_object
from megalite.config.faults import show
from megalite.errors import CommandError, ConfigError
from megalite.plan.devices import (
    DEVICES,
    PRECISIONS,
    Device,
    Efficiencies,
    guess_cpu,
    number_fault,
)
from megalite.plan.forecast import forecast, make_plan
from megalite.plan.seconds import Cluster, step_seconds

# Every run's step time depends on these. To fit others, runs must separate their effects.
_FITTED = ("matmul", "bandwidth", "link")
RECORD = "plan.json"  # predicted and measured numbers of a run
_PENALTY = 0.02  # of a factor of e from the default, relative to one run's squared error
_ROUNDS = 60
_MIN_EFFICIENCY, _MAX_EFFICIENCY = 1e-5, 1e4
_MAX_RANKS = 10**6
_STEP_SECONDS = (1e-6, 1e6, "seconds")


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run with its median step time.

    Attributes:
        seconds: measured seconds per step.
    """

    config: RunConfig
    cluster: Cluster
    seconds: float

    def predicted(self, device: Device) -> float:
        """Return the seconds per step that a plan predicts for this run on `device`."""
        cluster = dataclasses.replace(self.cluster, device=device)
        world = cluster.hosts * cluster.per_host
        native = self.cluster.device.native_bf16
        plan = make_plan(self.config, world_size=world, device=device.kind, native_bf16=native)
        return step_seconds(self.config, plan, cluster).total


def calibrate(folders: Sequence[Path]) -> dict[str, Any]:
    """Fit the machine that runs were on. Return its device file, for `--gpu FILE`.

    Args:
        folders: run folders.
    Raises:
        CommandError: a folder has no plan.json, or the runs were on several kinds of devices.
        ConfigError: the plan.json of a run is damaged.
    """
    runs = [read_run(folder) for folder in folders]
    names = sorted({run.cluster.device.name for run in runs})
    if len(names) > 1:
        raise CommandError(f"--calibrate: runs on {' and '.join(names)}; give runs on one device")
    device = runs[0].cluster.device
    best = _fit(runs, device)
    rates: dict[str, Any] = {}
    if device.kind == "cpu":
        best, rates = _scale_rates(device, best)
        rates["native_bf16"] = device.native_bf16
    return {
        "extends": device.name,
        "name": device.name,
        "source": f"calibrated by {', '.join(map(str, folders))}",
        **rates,
        "efficiencies": vars(best),
    }


def _scale_rates(device: Device, fitted: Efficiencies) -> tuple[Efficiencies, dict[str, float]]:
    """Move efficiencies above the default into the rates of a CPU, which are guesses.

    Predicted seconds stay the same.
    """
    default = device.efficiencies
    factors = {name: max(1.0, getattr(fitted, name) / getattr(default, name)) for name in _FITTED}
    shares = {name: getattr(fitted, name) / factor for name, factor in factors.items()}
    # attention shares the peak of matrix products, and is not fitted
    best = dataclasses.replace(fitted, **shares, attention=fitted.attention / factors["matmul"])
    peaks = {name: peak for name in PRECISIONS if (peak := device.peak(name)) is not None}
    rates = {name: peak * factors["matmul"] for name, peak in peaks.items()}
    rates |= {name: getattr(device, name) * factors[name] for name in ("bandwidth", "link")}
    return best, rates


def _fit(runs: Sequence[MeasuredRun], device: Device) -> Efficiencies:
    """Return the efficiencies that fit best, by coordinate descent with shrinking steps."""
    best = device.efficiencies
    limit = _MAX_EFFICIENCY if device.kind == "cpu" else 1.0  # a CPU's rates are guesses
    lowest = _cost(runs, device, best)
    width = 2.0
    for _ in range(_ROUNDS):
        moved = False
        for name in _FITTED:
            for factor in (width, 1 / width):
                share = min(limit, max(_MIN_EFFICIENCY, getattr(best, name) * factor))
                tried = dataclasses.replace(best, **{name: share})
                if (cost := _cost(runs, device, tried)) < lowest:
                    best = tried
                    lowest = cost
                    moved = True
        if not moved:
            width = math.sqrt(width)
        if width < 1.002:
            break
    return best


def _cost(runs: Sequence[MeasuredRun], device: Device, efficiencies: Efficiencies) -> float:
    """Return the mean squared log error of the predictions, plus a penalty."""
    tried = dataclasses.replace(device, efficiencies=efficiencies)
    default = device.efficiencies
    errors = sum(math.log(run.predicted(tried) / run.seconds) ** 2 for run in runs)
    distance = sum(
        math.log(getattr(efficiencies, name) / getattr(default, name)) ** 2 for name in _FITTED
    )
    return errors / len(runs) + _PENALTY * distance / len(_FITTED)


def read_run(folder: Path) -> MeasuredRun:
    """Read the plan.json of a run folder.

    Raises:
        CommandError: there is no plan.json.
        ConfigError: the plan.json is damaged.
    """
    file = folder / RECORD
    try:
        record = read_strict_object(file)
        if faults := list(_faults(record)):
            raise ConfigError(faults)
        device = DEVICES[record["device"]]
        if device.kind == "cpu":
            device = guess_cpu(record.get("native_bf16", False))
        cluster = Cluster(device, record["hosts"], record["per_host"])
        config = load_stored(folder / "config.json")
        run = MeasuredRun(config, cluster, float(record["measured"]["step_seconds"]))
        forecast(config, cluster)
    except FileNotFoundError:
        raise CommandError(
            f"--calibrate {folder}: it contains no {RECORD}, which a run writes at its end; give "
            "folders of finished runs"
        ) from None
    except ConfigError as error:
        lines = "\n".join(f"  {fault}" for fault in error.faults)
        raise ConfigError(
            f"--calibrate {file}: damaged; repeat the run, or remove it from the list:\n{lines}"
        ) from None
    return run


def _faults(record: Mapping[str, Any]) -> Iterator[str]:
    if (device := record.get("device")) not in list(DEVICES):
        yield f"device: expected a name of --gpu, got {show(device)}"
    for key in ("hosts", "per_host"):
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANKS:
            yield f"{key}: expected a whole number from 1 to {_MAX_RANKS}, got {show(value)}"
    if not isinstance(native := record.get("native_bf16", False), bool):
        yield f"native_bf16: expected true or false, got {show(native)}"
    measured = record.get("measured")
    if not isinstance(measured, Mapping):
        yield f"measured: expected an object, got {show(measured)}"
        return
    fault = number_fault("measured.step_seconds", measured.get("step_seconds"), _STEP_SECONDS)
    yield from filter(None, [fault])
