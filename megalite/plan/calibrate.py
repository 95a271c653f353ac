"""A machine's own efficiencies, from what runs on it took (`plan.json` in their folders)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite import files
from megalite.config import RunConfig, load_config
from megalite.errors import CommandError, MegaLiteError
from megalite.plan.devices import DEVICES, Device, Efficiencies
from megalite.plan.make import make_plan
from megalite.plan.seconds import Layout, step_seconds

# what a step of any run tells of; the rest needs runs that would tell it apart, and is left
_FITTED = ("matmul", "bandwidth", "link")
RECORD = "plan.json"  # what a run leaves of prediction and measurement
_PULL = 0.02  # how much a factor of e away from the usual costs, beside a run's error squared
_ROUNDS = 60


@dataclass(frozen=True)
class Run:
    config: RunConfig
    layout: Layout
    seconds: float

    def predicted(self, device: Device) -> float:
        layout = dataclasses.replace(self.layout, device=device)
        kind: Any = "cpu" if device.name == "cpu" else "cuda"
        plan = make_plan(self.config, world_size=layout.hosts * layout.per_host, device=kind)
        return step_seconds(self.config, plan, layout).total


def calibrate(folders: Sequence[Path]) -> dict[str, Any]:
    """What a device file says of the machine that the runs were on, for `--gpu FILE`.

    Raises:
        CommandError: a folder without such a record, or runs on several kinds of devices.
    """
    runs = [read_run(folder) for folder in folders]
    names = sorted({run.layout.device.name for run in runs})
    if len(names) > 1:
        raise CommandError(f"--calibrate: runs on {' and '.join(names)}; give those of one device")
    device = runs[0].layout.device
    best = _fit(runs, device)
    return {
        "extends": device.name,
        "name": device.name,
        "source": f"calibrated by {', '.join(map(str, folders))}",
        "efficiencies": {name: getattr(best, name) for name in vars(best)},
    }


def _fit(runs: Sequence[Run], device: Device) -> Efficiencies:
    """By turns each efficiency is moved up and down, in steps that shrink."""
    best = device.efficiencies
    lowest, width = _cost(runs, device, best), 2.0
    for _ in range(_ROUNDS):
        moved = False
        for name in _FITTED:
            for factor in (width, 1 / width):
                tried = dataclasses.replace(best, **{name: getattr(best, name) * factor})
                if (cost := _cost(runs, device, tried)) < lowest:
                    best, lowest, moved = tried, cost, True
        if not moved:
            width = math.sqrt(width)
        if width < 1.002:
            break
    return best


def _cost(runs: Sequence[Run], device: Device, efficiencies: Efficiencies) -> float:
    tried = dataclasses.replace(device, efficiencies=efficiencies)
    usual = device.efficiencies
    errors = sum(math.log(run.predicted(tried) / run.seconds) ** 2 for run in runs)
    pulls = sum(
        math.log(getattr(efficiencies, name) / getattr(usual, name)) ** 2 for name in _FITTED
    )
    return errors / len(runs) + _PULL * pulls / len(_FITTED)


def read_run(folder: Path) -> Run:
    try:
        record = files.read_json(folder / RECORD)
        layout = Layout(DEVICES[record["device"]], record["hosts"], record["per_host"])
        seconds = float(record["measured"]["step_seconds"])
        if not seconds > 0:
            raise ValueError(f"a step of {seconds} seconds")
        return Run(load_config(folder / "config.json"), layout, seconds)
    except FileNotFoundError:
        raise CommandError(
            f"--calibrate {folder}: no {RECORD} there; give run folders whose runs have ended"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, MegaLiteError) as error:
        raise CommandError(f"--calibrate {folder}: {RECORD} tells nothing: {error}") from None
