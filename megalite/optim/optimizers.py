"""torch's AdamW and SGD, and Muon, with weight decay that is decoupled from the gradient.

Weight decay applies to matrices, not to norms and biases (`ParameterSpec.decay`). L2 decay is
AdamW's, `w <- w (1 - lr l2)` (Loshchilov & Hutter 2019), also for SGD. L1 decay is the proximal
step `w <- sign(w) max(|w| - lr l1, 0)` after the update, which reaches exact zeros (Parikh & Boyd
2014, section 6.5.2). SGD's L2 decay and L1 decay are hooks of the optimizer. So they act on the
fp32 master weights of any engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megalite import arch, registry
from megalite.config import OptimizerConfig, RunConfig
from megalite.optim.muon import Muon
from megalite.plan.optimizer import counts_steps, state_names, updates_matrices

Groups = list[dict[str, Any]]


def make_optimizer(
    config: RunConfig, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """Return the optimizer of a run file.

    Its groups are "decay" and "no_decay", preceded by "matrices" for Muon. A group's `states` are
    the names of its element-wise optimizer states. If a group's `counts_steps` is true, the state
    of a parameter also has `step`, the number of updates so far.
    """
    section = config.optimizer
    rows = {row.name: row for row in arch.parameters(config.model)}
    groups: dict[str, dict[str, Any]] = {}
    for name in ("matrices", "decay", "no_decay"):
        decays = name != "no_decay"
        groups[name] = {
            "name": name,
            "params": [],
            "weight_decay": section.weight_decay if decays else 0.0,
            "l1": section.l1 if decays else 0.0,
            "matrices": name == "matrices",
        }
    for name, parameter in named_parameters:
        row = rows[name]
        if not arch.is_trainable(config, row):
            continue
        group_name = "decay" if row.decay else "no_decay"
        if row.is_matrix_of_block and updates_matrices(config):
            group_name = "matrices"
        group = groups[group_name]
        group["params"].append(parameter)
        group["states"] = state_names(config, row)
        group["counts_steps"] = counts_steps(config, row)
    make = registry.optimizers.load(section.name)
    optimizer = make(section, [group for group in groups.values() if group["params"]])
    if section.l1:
        optimizer.register_step_post_hook(_soft_threshold)
    return optimizer


@registry.optimizers.register("adamw", states=("exp_avg", "exp_avg_sq"), counts_steps=True)
def _adamw(section: OptimizerConfig, groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True
    )


@registry.optimizers.register(
    "muon",
    states=("exp_avg", "exp_avg_sq"),
    matrix_states=("momentum_buffer",),
    counts_steps=True,
)
def _muon(section: OptimizerConfig, groups: Groups) -> torch.optim.Optimizer:
    return Muon(
        groups, lr=section.lr, betas=section.betas, eps=section.eps, momentum=section.momentum
    )


@registry.optimizers.register("sgd", states=("momentum_buffer",), states_need="momentum")
def _sgd(section: OptimizerConfig, groups: Groups) -> torch.optim.Optimizer:
    for group in groups:  # torch adds SGD's decay to the gradient; a hook decouples it
        group["decoupled_l2"] = group.pop("weight_decay")
    optimizer = torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)
    if section.weight_decay:
        optimizer.register_step_pre_hook(_shrink)
    return optimizer


@torch.no_grad()
def _shrink(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        present = [p for p in group["params"] if p.grad is not None]
        if present and group["decoupled_l2"]:  # ZeRO-3 steps one group at a time; others are empty
            torch._foreach_mul_(present, 1 - group["lr"] * group["decoupled_l2"])


@torch.no_grad()
def _soft_threshold(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["l1"] else ():
            if parameter.grad is not None:
                parameter.copy_(F.softshrink(parameter, group["lr"] * group["l1"]))
