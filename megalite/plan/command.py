"""Checks of launcher/plan.py's arguments, against each other and against the disk."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite import files
from megalite.config import RunConfig, example_model, lacks_model, load_config
from megalite.errors import CommandError
from megalite.log import logger
from megalite.plan.calibrate import RECORD, calibrate


def refuse_useless(arguments: argparse.Namespace) -> None:
    """Refuse options that would be ignored.

    Raises:
        CommandError: the options, and those that they need.
    """
    for name in ("nodes", "gpus_per_node"):
        if not 1 <= (value := getattr(arguments, name)) <= 10**6:
            raise CommandError(f"--{name.replace('_', '-')} {value}: give 1 to 1,000,000")
    beside = ("config", "set", "search", "init_from")
    told = [f"--{name.replace('_', '-')}" for name in beside if getattr(arguments, name)]
    if arguments.calibrate and told:
        raise CommandError(f"--calibrate reads runs alone: leave out {' and '.join(told)}")
    if arguments.output is not None and not (arguments.calibrate or arguments.search):
        raise CommandError("--output is of --search or --calibrate: add one, or leave it out")
    if not arguments.calibrate and arguments.config is None:
        raise CommandError("--config is missing; give a run file, such as configs/7b.json")


def calibrated(runs: Sequence[str], output: Path | None) -> tuple[Path, dict[str, Any]]:
    """Write the device file that runs are calibrated to; return its path and content."""
    folders = [Path(run) for run in runs]
    reads = [folder / name for folder in folders for name in (RECORD, "config.json")]
    if output is not None:
        files.check_target(output, reads)
    device = calibrate(folders)
    path = output or Path(f"{device['name']}.json")
    files.check_target(path, reads)
    files.write_json(path, device)
    return path, device


def planned_config(
    path: str, sets: Sequence[str], model: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return a run file, completed if it fine-tunes a model that it does not describe.

    Args:
        model: the model section it gets. None means the examples of the section's keys.
    Raises:
        ConfigError: faults of the file.
    """
    if model is None and lacks_model(path, sets):
        model = example_model()
        shape = ", ".join(f"{key} {value}" for key, value in model.items())
        logger.warning(
            "%s names no model: planned for one of %s; name yours with --init-from", path, shape
        )
    return load_config(path, sets, model=model)
