"""torch's AdamW and SGD over two groups, with decay that is decoupled from the gradient.

Matrices decay; norms and biases do not (the table of shapes says which is which). L2 decay is
AdamW's own, `w <- w (1 - lr l2)` (Loshchilov & Hutter 2019), for SGD too; L1 decay is the proximal
step `w <- sign(w) max(|w| - lr l1, 0)` after the update, which reaches exact zeros (Parikh & Boyd
2014, section 6.5.2). Both are hooks of the optimizer, so they act on the fp32 masters, wherever an
engine keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megalite import shapes
from megalite.config import RunConfig


def make_optimizer(
    config: RunConfig, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """The optimizer a run file names, over the groups "decay" and "no_decay"."""
    section = config.optimizer
    decays = {parameter.name: parameter.decay for parameter in shapes.parameters(config.model)}
    named = list(named_parameters)
    groups: list[dict[str, Any]] = [
        {
            "name": "decay" if decay else "no_decay",
            "params": [p for name, p in named if decays[name] == decay],
            "weight_decay": section.weight_decay if decay else 0.0,
            "l1": section.l1 if decay else 0.0,
        }
        for decay in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if section.name == "adamw":
        optimizer = torch.optim.AdamW(
            groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True
        )
    else:
        for group in groups:  # torch couples SGD's decay with the gradient: ours is a hook
            group["decoupled_l2"] = group.pop("weight_decay")
        optimizer = torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)
        if section.weight_decay:
            optimizer.register_step_pre_hook(_shrink)
    if section.l1:
        optimizer.register_step_post_hook(_soft_threshold)
    return optimizer


def state_names(config: RunConfig) -> tuple[str, ...]:
    """Names of the element-wise states the optimizer keeps for each parameter."""
    if config.optimizer.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.optimizer.momentum else ()


@torch.no_grad()
def _shrink(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        present = [p for p in group["params"] if p.grad is not None]
        if present and group["decoupled_l2"]:  # ZeRO-3 steps one group at a time, the others empty
            torch._foreach_mul_(present, 1 - group["lr"] * group["decoupled_l2"])


@torch.no_grad()
def _soft_threshold(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["l1"] else ():
            if parameter.grad is not None:
                parameter.copy_(F.softshrink(parameter, group["lr"] * group["l1"]))
