"""Marks and hooks for the parameters of a model that ranks share.

The table of parameters states each parameter's split:

    output, heads  column-parallel: every rank reads the whole input, whose gradients are summed
    input          row-parallel: the outputs are summed, and the bias is added after the sum
    vocabulary     embedding: ids of other ranks give zero, and the ranks sum the rows;
                   head: the fused cross entropy exchanges maxima and sums of the rows

The model's forward contains these collectives (`megalite.parallel.regions`). This module marks the
parameters for the gradient norm. It also sums the gradients of replicated parameters of which each
rank computes only a part.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from megalite import arch
from megalite.config import ModelConfig
from megalite.parallel.collectives import all_reduce_async
from megalite.parallel.grid import Grid


def apply_tensor_parallel(
    model: nn.Module, config: ModelConfig, grid: Grid, *, sequence: bool = False
) -> None:
    """Mark the parameters that are split, and sum gradients of which each rank has a part.

    The sum happens inside the backward, before an engine reads the gradient. With one tensor rank
    there is nothing to do.

    Args:
        config: configuration of the whole model.
        sequence: whether the run uses sequence parallelism.
    """
    if grid.at.mesh.tensor == 1:
        return
    for row in arch.parameters(config):
        parameter = model.get_parameter(row.name)
        is_split = row.tensors[0].split is not arch.Split.REPLICATED
        # DeepSpeed adds a parameter's norm on every rank if this mark is true
        # (deepspeed/runtime/utils.py: is_model_parallel_parameter)
        parameter.tensor_model_parallel = is_split  # type: ignore[attr-defined]
        if arch.needs_tp_grad_sum(row, sequence=sequence) and parameter.requires_grad:
            parameter.register_hook(partial(_sum_gradient, grid.tensor_group))


def is_counted(parameter: nn.Parameter, grid: Grid) -> bool:
    """Return whether this rank adds its part of a parameter to a sum over the tensor ranks.

    Only the first rank adds a replicated parameter.
    """
    return grid.at.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)


def _sum_gradient(group: dist.ProcessGroup, grad: Tensor) -> Tensor:
    return all_reduce_async(grad, group)()
