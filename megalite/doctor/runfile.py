"""A run file on this machine: what launchers find out before they train, each as a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megalite.config import RunConfig, find_run, load_config, stated_model
from megalite.doctor.row import GIB, Row
from megalite.errors import ConfigError
from megalite.launchers import ALONE
from megalite.plan import make_plan


def load(path: str, start: Path | None = None) -> RunConfig:
    """Return the run file; one of fine-tuning may leave its model to the run's own checkpoints.

    Args:
        start: the folder of the model that a fresh run starts from.
    Raises:
        ConfigError: all of its faults.
    """
    from megalite.checkpoint import describe_run, describe_start

    try:
        return load_config(path)
    except ConfigError:
        if start is not None:
            return load_config(path, model=describe_start(start)[0])
        own = find_run(path)
        known = describe_run(own, stated_model(path)) if own is not None else None
        config = load_config(path, model=known[0]) if known else None
        if config is None or config.finetune is None:
            raise
        return config


def data(config: RunConfig, look: Callable[[RunConfig], str]) -> Row:
    """Raise a UserError for faulty shards, or for faulty examples, which `look` examines."""
    if config.finetune is not None:
        return Row("ok", look(config))
    from megalite.train.options import open_shards

    train, valid = open_shards(config)
    facts = train.describe()
    read = config.training.steps * config.training.global_batch_size / train.num_samples
    told = f"{len(facts['sources'])} sources, {facts['tokens']:,} tokens, read {read:.2g} times"
    held = f"; held out: {valid.num_samples * valid.sequence_length:,}" if valid else ""
    return Row("ok", told + held)


def memory(config: RunConfig) -> Row:
    """Return whether a run on all GPUs of this host, or on its processor, fits."""
    import torch

    from megalite.train.checks import hardware_faults

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    ranks = gpus or config.parallel.tensor
    plan = make_plan(config, world_size=ranks, device=device)
    launch = replace(ALONE, world_size=ranks, local_world_size=ranks)
    if faults := hardware_faults(config, plan, launch, device):
        return Row("fail", "\n".join(faults), "more hosts: see launcher/plan.py --nodes")
    size = plan.memory_bytes["total"] / GIB
    fit = f"{ranks} ranks fit, each" if ranks > 1 else "one rank fits,"
    where = "its GPU's" if gpus else "this host's"
    return Row("ok", f"{fit} with {size:.2f} GiB of {where} memory")


def checkpoints(config: RunConfig, free: int) -> Row:
    """Return whether the disk has room for all that the run keeps, and for the next one
    next to it.
    """
    from megalite.checkpoint import checkpoint_bytes

    size = checkpoint_bytes(config)
    section = config.checkpoint
    steps = config.training.steps
    count = section.keep + 1 + section.keep_best
    count += steps // section.keep_every if section.keep_every else 0
    if steps:  # else the examples decide
        count = min(count, -(-steps // section.every) if section.every else 1)
    root = Path(config.logging.directory) / config.name / "checkpoints"
    there = sum(file.stat().st_size for file in root.glob("step_*/**/*") if file.is_file())
    needed = max(0, count * size - there)
    told = (
        f"{count} of {size / GIB:.2f} GiB, {there / GIB:.2f} GiB of them there; "
        f"{free / GIB:,.1f} GiB free"
    )
    if needed > free:
        return Row("fail", told, "make room, or lower checkpoint.keep")
    return Row("ok", told)
