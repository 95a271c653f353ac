"""Checks of the arguments of `plan`, against each other and against the disk."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite import files
from megalite.config import (
    ConfigSource,
    RunConfig,
    example_model,
    lacks_model,
    load_config,
    source_name,
)
from megalite.errors import CommandError
from megalite.log import logger
from megalite.plan.calibrate import RECORD, calibrate
from megalite.plan.devices import find_device
from megalite.plan.seconds import Cluster


def check_plan_options(arguments: argparse.Namespace) -> None:
    """Refuse options that would be ignored.

    Raises:
        CommandError: an option has no effect here, or --config is missing.
    """
    ignored = ("config", "set", "search", "init_from")
    given = [f"--{name.replace('_', '-')}" for name in ignored if getattr(arguments, name)]
    if arguments.calibrate and given:
        raise CommandError(f"--calibrate reads only runs; remove {' and '.join(given)}")
    if arguments.output is not None and not (arguments.calibrate or arguments.search):
        raise CommandError("--output needs --search or --calibrate; add one, or remove --output")
    if not arguments.calibrate and arguments.config is None:
        raise CommandError("--config is missing; give a run file, such as configs/7b.json")


def write_calibration(runs: Sequence[str], output: Path | None) -> tuple[Path, dict[str, Any]]:
    """Calibrate a device by runs. Write its device file; return the file's path and content."""
    folders = [Path(run) for run in runs]
    reads = [folder / name for folder in folders for name in (RECORD, "config.json")]
    if output is not None:
        files.check_target(output, reads)
    device = calibrate(folders)
    path = output or Path(f"{device['name']}.json")
    files.check_target(path, reads)
    files.write_json(path, device)
    return path, device


def make_cluster(gpu: str, nodes: int, gpus_per_node: int) -> Cluster:
    """Return the hardware of a plan.

    Args:
        gpu: the name of a device, or the path of its file.
    Raises:
        CommandError: the device is unknown, or a number is out of range.
    """
    for name, value in (("nodes", nodes), ("gpus-per-node", gpus_per_node)):
        if not 1 <= value <= 10**6:
            raise CommandError(f"--{name} {value}: set it to 1 to 1,000,000")
    return Cluster(find_device(gpu), nodes, gpus_per_node)


def planned_config(
    source: ConfigSource, sets: Sequence[str], model: Mapping[str, Any] | None = None
) -> RunConfig:
    """Load a run file. Complete a fine-tuning run that describes no model.

    Args:
        model: the model section to add. None means the example values of its keys.
    Raises:
        ConfigError: the file has faults.
    """
    if model is None and lacks_model(source, sets):
        model = example_model()
        shape = ", ".join(f"{key} {value}" for key, value in model.items())
        logger.warning(
            "%s names no model: planning for a model with %s; name yours with --init-from",
            source_name(source),
            shape,
        )
    return load_config(source, sets, model=model)
