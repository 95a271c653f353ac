"""Forecast of a run in plain numbers, before it starts. No torch, no devices."""

from megalite.plan.engine import deepspeed_dict
from megalite.plan.flops import flops_per_token, hardware_flops_per_token
from megalite.plan.forecast import make_plan
from megalite.plan.memory import host_bytes
from megalite.plan.precision import (
    bf16_units,
    legacy_auto_precision,
    recorded_precision,
    resolve_precision,
)
from megalite.plan.sizes import Plan, resolve_labels
from megalite.plan.traffic import Collective, data_collectives, tensor_collectives

__all__ = [
    "Collective",
    "Plan",
    "bf16_units",
    "data_collectives",
    "deepspeed_dict",
    "flops_per_token",
    "hardware_flops_per_token",
    "host_bytes",
    "legacy_auto_precision",
    "make_plan",
    "recorded_precision",
    "resolve_labels",
    "resolve_precision",
    "tensor_collectives",
]
