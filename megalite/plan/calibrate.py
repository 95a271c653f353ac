"""A machine's own efficiencies, fitted to the step times of runs on it (their `plan.json`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.config import RunConfig, load_stored, read_object
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

# A step of any run depends on these. Others would need runs that separate their effects.
_FITTED = ("matmul", "bandwidth", "link")
RECORD = "plan.json"  # a run's file of predicted and measured numbers
_PULL = 0.02  # the cost of a factor of e from the usual value, relative to a run's squared error
_ROUNDS = 60
_LEAST, _MOST = 1e-5, 1e4  # an efficiency that is fitted
_MOST_RANKS = 10**6
_STEP_SECONDS = (1e-6, 1e6, "seconds")


@dataclass(frozen=True)
class MeasuredRun:
    config: RunConfig
    cluster: Cluster
    seconds: float

    def predicted(self, device: Device) -> float:
        cluster = dataclasses.replace(self.cluster, device=device)
        world = cluster.hosts * cluster.per_host
        native = self.cluster.device.native_bf16
        plan = make_plan(self.config, world_size=world, device=device.kind, native_bf16=native)
        return step_seconds(self.config, plan, cluster).total


def calibrate(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the device file, for `--gpu FILE`, of the machine that runs were on.

    Args:
        folders: run folders.
    Raises:
        CommandError: a folder without a record, or runs on several kinds of devices.
        ConfigError: a record that no run can have written.
    """
    runs = [read_run(folder) for folder in folders]
    names = sorted({run.cluster.device.name for run in runs})
    if len(names) > 1:
        raise CommandError(f"--calibrate: runs on {' and '.join(names)}; give those of one device")
    device = runs[0].cluster.device
    best = _fit(runs, device)
    rates: dict[str, Any] = {}
    if device.kind == "cpu":
        best, rates = _raised(device, best)
        rates["native_bf16"] = device.native_bf16
    return {
        "extends": device.name,
        "name": device.name,
        "source": f"calibrated by {', '.join(map(str, folders))}",
        **rates,
        "efficiencies": vars(best),
    }


def _raised(device: Device, fitted: Efficiencies) -> tuple[Efficiencies, dict[str, float]]:
    """Return efficiencies and rates of a CPU, whose rates were guesses.

    Rates rise until the usual efficiencies explain the runs. Predicted seconds stay the same.
    """
    usual = device.efficiencies
    more = {name: max(1.0, getattr(fitted, name) / getattr(usual, name)) for name in _FITTED}
    shares = {name: getattr(fitted, name) / factor for name, factor in more.items()}
    # attention has the products' peak, and was not fitted
    best = dataclasses.replace(fitted, **shares, attention=fitted.attention / more["matmul"])
    peaks = {name: peak for name in PRECISIONS if (peak := device.peak(name)) is not None}
    rates = {name: peak * more["matmul"] for name, peak in peaks.items()}
    rates |= {name: getattr(device, name) * more[name] for name in ("bandwidth", "link")}
    return best, rates


def _fit(runs: Sequence[MeasuredRun], device: Device) -> Efficiencies:
    """Return the efficiencies that fit best: each in turn moves up and down, by smaller steps."""
    best = device.efficiencies
    most = _MOST if device.kind == "cpu" else 1.0  # a CPU's rates are guesses
    lowest = _cost(runs, device, best)
    width = 2.0
    for _ in range(_ROUNDS):
        moved = False
        for name in _FITTED:
            for factor in (width, 1 / width):
                share = min(most, max(_LEAST, getattr(best, name) * factor))
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
    tried = dataclasses.replace(device, efficiencies=efficiencies)
    usual = device.efficiencies
    errors = sum(math.log(run.predicted(tried) / run.seconds) ** 2 for run in runs)
    pulls = sum(
        math.log(getattr(efficiencies, name) / getattr(usual, name)) ** 2 for name in _FITTED
    )
    return errors / len(runs) + _PULL * pulls / len(_FITTED)


def read_run(folder: Path) -> MeasuredRun:
    """Return a run by the record in its folder.

    Raises:
        CommandError: no record there.
        ConfigError: a record that no run can have written.
    """
    file = folder / RECORD
    try:
        record = read_object(file)
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
            f"--calibrate {folder}: no {RECORD} there; give run folders whose runs have ended"
        ) from None
    except ConfigError as error:
        lines = "\n".join(f"  {fault}" for fault in error.faults)
        raise ConfigError(
            f"--calibrate {file}: it records no run; run it again, or remove it:\n{lines}"
        ) from None
    return run


def _faults(record: Mapping[str, Any]) -> Iterator[str]:
    if (device := record.get("device")) not in list(DEVICES):
        yield f"device: expected a name of --gpu, found {show(device)}"
    for key in ("hosts", "per_host"):
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_RANKS:
            yield f"{key}: expected a whole number from 1 to {_MOST_RANKS}, found {show(value)}"
    if not isinstance(native := record.get("native_bf16", False), bool):
        yield f"native_bf16: expected true or false, found {show(native)}"
    measured = record.get("measured")
    if not isinstance(measured, Mapping):
        yield f"measured: expected an object, found {show(measured)}"
        return
    fault = number_fault("measured.step_seconds", measured.get("step_seconds"), _STEP_SECONDS)
    yield from filter(None, [fault])
