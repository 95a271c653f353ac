"""Forecast of a run on given devices: memory, time and communication."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from megalite.config import RunConfig
from megalite.errors import ConfigError
from megalite.plan.devices import PRECISIONS, Kind
from megalite.plan.flops import hardware_flops_per_token
from megalite.plan.memory import host_bytes, memory_bytes
from megalite.plan.process import process_bytes
from megalite.plan.seconds import Cluster, Seconds, step_seconds
from megalite.plan.sizes import Plan, layout_plan, resolve_labels
from megalite.plan.traffic import Collective, data_collectives, tensor_collectives

# Memory that a GPU needs beyond a plan's tensors, fitted to published runs (benchmarks/plan.py):
_CONTEXT = 3 << 29  # bytes of the driver's context and NCCL's buffers
_WASTE = 0.04  # share that fragments in PyTorch's caching allocator


def make_plan(
    config: RunConfig,
    *,
    world_size: int,
    device: Literal["cpu", "cuda"],
    native_bf16: bool | None = None,
) -> Plan:
    """Return the plan of a run on `world_size` ranks, with its memory.

    A classifier whose labels are unknown is planned with a few labels.

    Args:
        native_bf16: whether a "cpu" has units for bf16, which decides `precision: auto`. None means
            that this host decides.
    Raises:
        ConfigError: see `layout_plan`.
    """
    config = resolve_labels(config)
    plan = layout_plan(config, world_size=world_size, device=device, native_bf16=native_bf16)
    return dataclasses.replace(plan, memory_bytes=memory_bytes(config, plan, device))


@dataclass(frozen=True)
class Forecast:
    """A plan on its hardware.

    Attributes:
        overhead: bytes of a device that the driver and fragmentation take.
        host_bytes: bytes per rank in host memory, by use.
        collectives: the collective calls of one step.
    """

    plan: Plan
    cluster: Cluster
    seconds: Seconds
    overhead: int
    host_bytes: dict[str, int]
    hardware_flops_per_token: int
    collectives: tuple[Collective, ...]

    @property
    def free(self) -> int:
        """Return the free bytes of a device. Negative means that the run does not fit."""
        return self.cluster.device.memory - self.plan.memory_bytes["total"] - self.overhead

    @property
    def fits(self) -> bool:
        """Return whether the run fits the memory of its devices."""
        return self.free >= 0

    @property
    def tokens_per_second(self) -> float:
        """Return tokens per second over all ranks."""
        return self.plan.tokens_per_step / self.seconds.total

    @property
    def mfu(self) -> float:
        """Return the model FLOPs utilization, 0 to 1."""
        peak = self.cluster.device.peak(self.plan.precision)
        assert peak is not None
        ranks = self.plan.world_size if self.cluster.device.kind != "cpu" else self.cluster.hosts
        return self.plan.flops_per_token * self.tokens_per_second / (peak * ranks)

    def as_json(self, steps: int) -> dict[str, Any]:
        """Return the forecast for `--json`, in seconds and bytes.

        Args:
            steps: optimizer steps of the run. 0 means unknown; the run's time is then None.
        """
        run = self.seconds.total * steps if steps else None
        return {
            "parameters": self.plan.parameters,
            "flops_per_token": self.plan.flops_per_token,
            "hardware_flops_per_token": self.hardware_flops_per_token,
            "fits": self.fits,
            "memory_bytes": self.plan.memory_bytes,
            "margin_bytes": self.overhead,
            "device_bytes": self.cluster.device.memory,
            "host_bytes": self.host_bytes,
            "step_seconds": self.seconds.total,
            "seconds": vars(self.seconds),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "run_seconds": run,
            "device_hours": None if run is None else run * self.plan.world_size / 3600,
            "collectives": [vars(call) | {"bytes": call.bytes} for call in self.collectives],
        }


def _overhead(config: RunConfig, plan: Plan, kind: Kind) -> int:
    """Return the bytes beyond the plan's: GPU context and allocator, or a CPU process's heap."""
    if kind == "cuda":
        return _CONTEXT + round(_WASTE * plan.memory_bytes["total"])
    return max(0, process_bytes(config, plan) - plan.memory_bytes["total"])


def forecast(config: RunConfig, cluster: Cluster) -> Forecast:
    """Return the forecast of a run file on all devices of `cluster`.

    Raises:
        ConfigError: see `make_plan`. Also if the device has no units for the precision, or a host
            has fewer devices than `parallel.tensor`.
    """
    config = resolve_labels(config)
    kind = cluster.device.kind
    ranks = cluster.hosts * cluster.per_host
    native = cluster.device.native_bf16
    plan = make_plan(config, world_size=ranks, device=kind, native_bf16=native)
    if cluster.device.peak(plan.precision) is None:
        supported = " or ".join(p for p in PRECISIONS if cluster.device.peak(p) is not None)
        raise ConfigError(
            f"training.precision: a {cluster.device.name} has no units for {plan.precision}; "
            f"set it to {supported}"
        )
    if plan.mesh.tensor > cluster.per_host:
        raise ConfigError(
            f"parallel.tensor: {plan.mesh.tensor} ranks share a model, but a host has "
            f"{cluster.per_host} devices, and every layer exchanges data; set it to "
            f"{cluster.per_host} or less"
        )
    return Forecast(
        plan=plan,
        cluster=cluster,
        seconds=step_seconds(config, plan, cluster),
        overhead=_overhead(config, plan, kind),
        host_bytes=host_bytes(config, plan, kind),
        hardware_flops_per_token=hardware_flops_per_token(config),
        collectives=(*tensor_collectives(config, plan), *data_collectives(config, plan)),
    )
