"""Checks of a run file on this machine, which launchers also make before they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megalite.config import RunConfig, find_run, load_config, stated_model
from megalite.doctor.result import GIB, CheckResult
from megalite.errors import ConfigError
from megalite.launchers import ALONE
from megalite.plan import make_plan


def load_run_file(path: str, start: Path | None = None) -> RunConfig:
    """Load a run file. A fine-tuning run may take its model section from its own checkpoints.

    Args:
        path: the run file.
        start: the folder of the model that a fresh run starts from.
    Raises:
        ConfigError: every fault of the file.
    """
    from megalite.checkpoint import describe_run, describe_start

    try:
        return load_config(path)
    except ConfigError:
        if start is not None:
            return load_config(path, model=describe_start(start)[0])
        folder = find_run(path)
        described = describe_run(folder, stated_model(path)) if folder is not None else None
        config = load_config(path, model=described[0]) if described else None
        if config is None or config.finetune is None:
            raise
        return config


def data(config: RunConfig, preview: Callable[[RunConfig], str]) -> CheckResult:
    """Check the shards of a run, or its examples.

    Raises:
        UserError: the data is invalid; `preview` raises it for examples.
    """
    if config.finetune is not None:
        return CheckResult("ok", preview(config))
    from megalite.train.options import open_shards

    train, valid = open_shards(config)
    facts = train.describe()
    epochs = config.training.steps * config.training.global_batch_size / train.num_samples
    detail = f"{len(facts['sources'])} sources, {facts['tokens']:,} tokens, read {epochs:.2g} times"
    held_out = (
        f"; validation: {valid.num_samples * valid.sequence_length:,} tokens" if valid else ""
    )
    return CheckResult("ok", detail + held_out)


def memory_plan(config: RunConfig) -> CheckResult:
    """Check that a run fits into all GPUs of this host, or into its memory if there is none."""
    import torch

    from megalite.train.checks import hardware_faults

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    ranks = gpus or config.parallel.tensor
    plan = make_plan(config, world_size=ranks, device=device)
    launch = replace(ALONE, world_size=ranks, local_world_size=ranks)
    if faults := hardware_faults(config, plan, launch, device):
        advice = "use more hosts; megalite plan --nodes shows how many"
        return CheckResult("fail", "\n".join(faults), advice)
    size = plan.memory_bytes["total"] / GIB
    fit = f"{ranks} ranks fit, each" if ranks > 1 else "one rank fits,"
    owner = "its GPU's" if gpus else "this host's"
    return CheckResult("ok", f"{fit} with {size:.2f} GiB of {owner} memory")


def checkpoints(config: RunConfig, free: int) -> CheckResult:
    """Check that the disk has room for all checkpoints that the run keeps, and for one more.

    Args:
        config: the run file.
        free: free bytes of the disk.
    """
    from megalite.checkpoint import checkpoint_bytes

    size = checkpoint_bytes(config)
    section = config.checkpoint
    steps = config.training.steps
    count = section.keep + 1 + section.keep_best
    count += steps // section.keep_every if section.keep_every else 0
    if steps:  # when fine-tuning, the number of steps depends on the examples
        count = min(count, -(-steps // section.every) if section.every else 1)
    root = Path(config.logging.directory) / config.name / "checkpoints"
    written = sum(file.stat().st_size for file in root.glob("step_*/**/*") if file.is_file())
    needed = max(0, count * size - written)
    detail = (
        f"{count} of {size / GIB:.2f} GiB, {written / GIB:.2f} GiB already written; "
        f"{free / GIB:,.1f} GiB free"
    )
    if needed > free:
        return CheckResult("fail", detail, "make room, or lower checkpoint.keep")
    return CheckResult("ok", detail)
