"""A whole plan: sizes, and the memory that they take."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megalite.config import RunConfig
from megalite.plan.memory import memory_bytes
from megalite.plan.sizes import Plan, arrange, labelled


def make_plan(
    config: RunConfig,
    *,
    world_size: int,
    device: Literal["cpu", "cuda"],
    native_bf16: bool | None = None,
) -> Plan:
    """The plan of `config` on `world_size` ranks, with a stand-in for labels it does not tell.

    Args:
        native_bf16: whether a "cpu" has units for bf16, which decides `precision: auto`. None asks
            this host.
    Raises:
        ConfigError: see `arrange`.
    """
    config = labelled(config)
    plan = arrange(config, world_size=world_size, device=device, native_bf16=native_bf16)
    return dataclasses.replace(plan, memory_bytes=memory_bytes(config, plan, device))
