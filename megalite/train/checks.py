"""Hardware checks before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import psutil
import torch

from megalite import arch, env
from megalite.config import Precision, RunConfig
from megalite.env import Launch
from megalite.plan import Plan, host_bytes
from megalite.plan.zero import without_auto

# DeepSpeed's monitors that need a package, and the package's import name
_MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
_CGROUP_LIMITS = (  # cgroup version 2, then 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def hardware_faults(
    config: RunConfig, plan: Plan, launch: Launch, device: Literal["cpu", "cuda"]
) -> list[str]:
    """Return all reasons why this run cannot start here."""
    faults = list(_unsupported(config, plan, device))
    needed = plan.memory_bytes["total"]
    host = host_bytes(config, plan, device)
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info(launch.local_rank % torch.cuda.device_count())
        available = f"{free / 2**30:.1f} GiB are free on its GPU"
        faults += _host_faults(host, launch)
    else:
        needed = (needed + sum(host.values())) * launch.local_world_size
        free = available_memory()
        available = f"{free / 2**30:.1f} GiB are free on this host"
    if needed > free:
        parts = ", ".join(
            f"{name} {size / 2**30:.1f}"
            for name, size in {**plan.memory_bytes, **host}.items()
            if name != "total" and size >= 2**26
        )
        ranks = f" for {launch.local_world_size} ranks" if device == "cpu" else ""
        faults.append(
            f"memory: {config.name} needs about {needed / 2**30:.1f} GiB{ranks} "
            f"({parts} GiB a rank), but {available}; use more ranks with a higher ZeRO stage, "
            "parallel.tensor, a smaller micro_batch_size or activation_checkpointing"
        )
    return faults


def hints(config: RunConfig, plan: Plan) -> Iterator[str]:
    """Yield the number of trainable parameters, and settings that are valid but may be mistakes."""
    rows = arch.parameters(config.model)
    trainable = sum(row.elements for row in rows if arch.is_trainable(config, row))
    if trainable < plan.parameters:
        share = 100 * trainable / plan.parameters
        yield f"{trainable / 1e6:.3f} M parameters are trainable ({share:.2f} %)"
    if config.parallel.sequence and config.parallel.tensor == 1:
        yield "parallel.sequence has no effect if parallel.tensor is 1"
    warmup = config.schedule.warmup_steps
    steps = config.training.steps
    if warmup > steps:
        yield f"schedule.warmup_steps {warmup} is over training.steps {steps}: the rate only rises"


def _host_faults(host: Mapping[str, int], launch: Launch) -> Iterator[str]:
    """Yield a fault if the ranks' data in host memory does not fit."""
    needed = sum(host.values()) * launch.local_world_size
    free = available_memory()
    if needed > free:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in host.items() if size)
        yield (
            f"memory: {launch.local_world_size} ranks need {needed / 2**30:.1f} GiB of host memory "
            f"({parts} GiB a rank), but {free / 2**30:.1f} GiB are free on this host; use more "
            "hosts, or turn one of these off"
        )


def available_memory() -> int:
    """Return the bytes that are free on this host, within the limit of its control group."""
    free = int(psutil.virtual_memory().available)
    for limit, usage in _CGROUP_LIMITS:
        try:
            used = int(Path(usage).read_text()) - _cached(Path(usage).with_name("memory.stat"))
            free = min(free, int(Path(limit).read_text()) - used)
        except (OSError, ValueError):  # no such version, or "max": no limit
            continue
    return max(0, free)


def _cached(statistics: Path) -> int:
    """Return the bytes of cached files, which a control group counts but frees when needed."""
    lines = statistics.read_text().split() if statistics.exists() else []
    sizes = dict(zip(lines[::2], lines[1::2], strict=True))
    # version 1 has the sums over subgroups under total_...
    keys = ("active_file", "inactive_file")
    return sum(int(sizes.get(f"total_{key}", sizes.get(key, 0))) for key in keys)


def _unsupported(config: RunConfig, plan: Plan, device: Literal["cpu", "cuda"]) -> Iterator[str]:
    if plan.precision is Precision.FP16 and device == "cpu":
        yield (
            "training.precision fp16: no GPU found, and a CPU trains in fp32 or bf16; set it to "
            "auto"
        )
    wandb = config.logging.wandb
    if wandb is not None and wandb.mode != "disabled" and not env.has_package("wandb"):
        yield (
            "logging.wandb: the package wandb is not installed; install it with `pip install -e "
            '".[wandb]"`, or remove logging.wandb'
        )
    if config.logging.tensorboard and not env.has_package("tensorboard"):
        yield (
            "logging.tensorboard: the package tensorboard is not installed; install it with "
            "`pip install -e .`, or set logging.tensorboard to false"
        )
    if config.training.compile and not env.has_compiler():
        yield (
            "training.compile true: no C++ compiler on PATH, which torch.compile needs; install "
            "g++ or set it to false"
        )
    yield from _deepspeed_needs(config, plan, device)


def _deepspeed_needs(
    config: RunConfig, plan: Plan, device: Literal["cpu", "cuda"]
) -> Iterator[str]:
    """Yield a fault for each key of the `deepspeed` section that needs a missing package or GPU."""
    section = without_auto(config.deepspeed)
    for monitor, package in _MONITORS.items():
        if section.get(monitor, {}).get("enabled") is True and not env.has_package(package):
            yield (
                f"deepspeed.{monitor}: the package {package} is not installed; install it, or set "
                "enabled to false"
            )
    if plan.zero_stage == 3 and device == "cpu":
        for key in plan.zero.quantized:
            yield (
                f"deepspeed.zero_optimization.{key}: no GPU found, and DeepSpeed quantizes on GPUs "
                "only; set it to false"
            )
