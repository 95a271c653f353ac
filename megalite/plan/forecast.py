"""What a run will be on given devices: its memory, time and traffic, as one record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalite.config import RunConfig
from megalite.errors import ConfigError
from megalite.plan.devices import PRECISIONS, Kind
from megalite.plan.flops import hardware_flops_per_token
from megalite.plan.make import make_plan
from megalite.plan.memory import host_bytes
from megalite.plan.process import process_bytes
from megalite.plan.seconds import Layout, Seconds, step_seconds
from megalite.plan.sizes import Plan, labelled
from megalite.plan.traffic import Collective, data_collectives, tensor_collectives

# beside what is counted: the driver's context and NCCL's buffers, and what the allocator wastes
_CONTEXT, _WASTE = 3 << 29, 0.04


@dataclass(frozen=True)
class Forecast:
    """A plan on its devices.

    Attributes:
        margin: bytes of a device that are left to its driver and to waste.
        free: bytes that a device has beyond all of it; under 0 the run does not fit.
        mfu: of the model's own FLOPs.
    """

    plan: Plan
    layout: Layout
    seconds: Seconds
    margin: int
    host_bytes: dict[str, int]
    hardware_flops_per_token: int
    collectives: tuple[Collective, ...]

    @property
    def free(self) -> int:
        return self.layout.device.memory - self.plan.memory_bytes["total"] - self.margin

    @property
    def fits(self) -> bool:
        return self.free >= 0

    @property
    def tokens_per_second(self) -> float:
        return self.plan.tokens_per_step / self.seconds.total

    @property
    def mfu(self) -> float:
        peak = self.layout.device.peak(self.plan.precision)
        assert peak is not None
        ranks = self.plan.world_size if self.layout.device.kind != "cpu" else self.layout.hosts
        return self.plan.flops_per_token * self.tokens_per_second / (peak * ranks)

    def as_json(self, steps: int) -> dict[str, Any]:
        """For `--json`; seconds and bytes. Steps of 0 are not known: so is how long they take."""
        run = self.seconds.total * steps if steps else None
        return {
            "parameters": self.plan.parameters,
            "flops_per_token": self.plan.flops_per_token,
            "hardware_flops_per_token": self.hardware_flops_per_token,
            "fits": self.fits,
            "memory_bytes": self.plan.memory_bytes,
            "margin_bytes": self.margin,
            "device_bytes": self.layout.device.memory,
            "host_bytes": self.host_bytes,
            "step_seconds": self.seconds.total,
            "seconds": vars(self.seconds),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "run_seconds": run,
            "device_hours": None if run is None else run * self.plan.world_size / 3600,
            "collectives": [vars(call) | {"bytes": call.bytes} for call in self.collectives],
        }


def _margin(config: RunConfig, plan: Plan, kind: Kind) -> int:
    """Bytes beside those of the plan: a device's context and allocator, a process's heap."""
    if kind == "cuda":
        return _CONTEXT + round(_WASTE * plan.memory_bytes["total"])
    return max(0, process_bytes(config, plan) - plan.memory_bytes["total"])


def forecast(config: RunConfig, layout: Layout) -> Forecast:
    """The forecast of a run file on all devices of `layout`.

    Raises:
        ConfigError: what `make_plan` finds; a window over the positions is found by the run file's
            own rules; a device without units for the precision.
    """
    config = labelled(config)
    kind, ranks = layout.device.kind, layout.hosts * layout.per_host
    native = layout.device.native_bf16
    plan = make_plan(config, world_size=ranks, device=kind, native_bf16=native)
    if layout.device.peak(plan.precision) is None:
        had = " or ".join(p for p in PRECISIONS if layout.device.peak(p) is not None)
        raise ConfigError(
            f"training.precision: {plan.precision}, for which a {layout.device.name} has no units; "
            f"set it to {had}"
        )
    if plan.tensor_parallel > layout.per_host:
        raise ConfigError(
            f"parallel.tensor: {plan.tensor_parallel} ranks share a model, but a host has "
            f"{layout.per_host}; they talk at every layer, so keep them on one"
        )
    return Forecast(
        plan=plan,
        layout=layout,
        seconds=step_seconds(config, plan, layout),
        margin=_margin(config, plan, kind),
        host_bytes=host_bytes(config, plan, kind),
        hardware_flops_per_token=hardware_flops_per_token(config),
        collectives=(*tensor_collectives(config, plan), *data_collectives(config, plan)),
    )
