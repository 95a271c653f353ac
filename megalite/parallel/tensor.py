"""Facts for an optimizer about the parameters of a model that ranks share.

The table of shapes names each parameter's split:

    output, heads  column-parallel: the input is shared, its gradient summed over the ranks
    input          row-parallel: the output is summed over the ranks, the bias added after the sum
    vocabulary     of the embedding: ids of other ranks give zero, the sum has all rows;
                   of the head: the fused cross entropy exchanges its row maxima and sums

The collectives are in the model's own forward (`megalite.parallel.regions`). Here the parameters
are marked for norms, and gradients of parameters that every rank holds are summed if each rank
computes only a part of them.
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
    """Mark the parameters of a model that ranks share, and sum gradients of which each has a part.

    The sum happens inside the backward, before an engine takes the gradient. One rank alone needs
    nothing.

    Args:
        config: the whole model's configuration.
        sequence: whether the ranks share the tokens as well.
    """
    if grid.at.mesh.tensor == 1:
        return
    for row in arch.parameters(config):
        parameter = model.get_parameter(row.name)
        split = row.tensors[0].split is not arch.Split.REPLICATED
        # the mark by which DeepSpeed counts a parameter's norm on every rank
        # (deepspeed/runtime/utils.py: is_model_parallel_parameter)
        parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
        if arch.needs_tp_grad_sum(row, sequence=sequence) and parameter.requires_grad:
            parameter.register_hook(partial(_sum_gradient, grid.tensor_group))


def is_counted(parameter: nn.Parameter, grid: Grid) -> bool:
    """Return whether this rank's part of a parameter counts in a sum over the ranks of a model."""
    return grid.at.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)


def _sum_gradient(group: dist.ProcessGroup, grad: Tensor) -> Tensor:
    return all_reduce_async(grad, group)()
