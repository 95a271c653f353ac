"""A rank of a parity layout with a deliberate bug."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import megalite.engine.deepspeed.engine as deepspeed_engine
from megalite import checkpoint, env
from megalite.cli import run_main
from megalite.parallel import tensor
from megalite.parallel.collectives import reduce_from_tp
from megalite.parity import worker

UNMARKED = "model.layers.1.mlp.down_proj.weight"
BIASED = "model.layers.0.self_attn.o_proj"
PERTURBED = "model.layers.1.input_layernorm.weight"
UNSUMMED = "model.layers.0.input_layernorm.weight"
COPIED = "model.layers.0.input_layernorm.weight"  # the first that does not decay
DROPPED = "model.layers.0.mlp.up_proj.weight"


def after_split(change: Any) -> None:
    """Call `change(model, grid)` after the engine has set up tensor parallelism."""

    def apply(model: Any, config: Any, grid: Any, **options: Any) -> None:
        tensor.apply_tensor_parallel(model, config, grid, **options)
        change(model, grid)

    deepspeed_engine.apply_tensor_parallel = apply


def unmarked(model: Any, _grid: Any) -> None:
    del model.get_parameter(UNMARKED).tensor_model_parallel


def biased(model: Any, grid: Any) -> None:
    module = model.get_submodule(BIASED)

    def forward(x: Any) -> Any:
        return reduce_from_tp(F.linear(x, module.weight) + module.bias, grid.tensor_group)

    module.forward = forward


def perturbed(model: Any, grid: Any) -> None:
    if grid.rank == grid.world_size - 1:
        with torch.no_grad():
            model.get_parameter(PERTURBED)[0] += 1e-2


def unsummed(model: Any, _grid: Any) -> None:
    """Remove the sum of a norm's gradient over the ranks under sequence parallelism."""
    model.get_parameter(UNSUMMED)._backward_hooks.clear()


def copying(restore: Any) -> Any:
    """Load a checkpoint, and then give every group the hyper-parameters of the first."""

    def load(engine: Any, *args: Any, **kwargs: Any) -> Any:
        place = restore(engine, *args, **kwargs)
        first, *others = engine._torch_optimizer().param_groups
        for group in others:
            group["weight_decay"] = first["weight_decay"]
        return place

    return load


def dropping(restore: Any) -> Any:
    """Load a checkpoint, and then set one moment to zero."""

    def load(engine: Any, *args: Any, **kwargs: Any) -> Any:
        place = restore(engine, *args, **kwargs)
        parameter = dict(engine.model.named_parameters())[DROPPED]
        moment = engine.read_state(parameter, "exp_avg")
        engine.write_state(parameter, "exp_avg", torch.zeros_like(moment))
        return place

    return load


def work(bug: str, launch: env.Launch, job: str) -> None:
    """Run a rank of a layout with the bug."""
    if bug == "dropped":
        checkpoint.restore = dropping(checkpoint.restore)
    elif bug == "copied":
        checkpoint.restore = copying(checkpoint.restore)
    elif bug == "silent":  # the other rank waits forever
        if launch.rank == 1:
            sys.exit("no room left on this rank")
    elif bug != "none":
        after_split(globals()[bug])
    run_main(partial(worker.main, job), ranks=True)
