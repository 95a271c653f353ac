"""Collectives of the tensor ranks, each with its backward.

A collective has a start and a finish, so that computation in between overlaps it. While
torch.compile traces, the start waits for the result, and the compiler schedules the collective.

B batch   T tokens   t tokens of one rank, T / ranks   D width   O outputs of a layer's part
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Finish = Callable[[], Tensor]
Exchange = Callable[[Tensor, dist.ProcessGroup], Tensor]


def all_reduce_async(x: Tensor, group: dist.ProcessGroup) -> Finish:
    """Start the sum over the ranks. `x` does not change."""
    # not in place: selective recompute saves x, and would sum it a second time
    y = x.clone(memory_format=torch.contiguous_format)
    return _finish(dist.all_reduce(y, group=group, async_op=_is_async()), lambda: y)


def all_gather_async(x_BtD: Tensor, group: dist.ProcessGroup) -> Finish:
    """Start to gather the tokens of all ranks, in the order of ranks: [B, t, D] -> [B, T, D]."""
    B, t, D = x_BtD.shape
    n = dist.get_world_size(group)
    y = x_BtD.new_empty((n * B, t, D))
    work = dist.all_gather_into_tensor(y, x_BtD.contiguous(), group=group, async_op=_is_async())
    return _finish(work, lambda: y.view(n, B, t, D).transpose(0, 1).reshape(B, n * t, D))


def reduce_scatter_async(x_BTD: Tensor, group: dist.ProcessGroup) -> Finish:
    """Start the sum over the ranks; each gets the sum for its tokens: [B, T, D] -> [B, t, D]."""
    B, T, D = x_BTD.shape
    n = dist.get_world_size(group)
    parts = x_BTD.view(B, n, T // n, D).transpose(0, 1).contiguous().view(n * B, T // n, D)
    y = x_BTD.new_empty((B, T // n, D))
    work = dist.reduce_scatter_tensor(y, parts, group=group, async_op=_is_async())
    return _finish(work, lambda: y, parts)


def _is_async() -> bool:
    return not torch.compiler.is_compiling()


def _finish(work: Any, result: Finish, *_inputs: Tensor) -> Finish:  # keeps the inputs alive
    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return result()

    return finish


class _Exchange(torch.autograd.Function):
    """An exchange in the forward, and its transpose in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, exchange: Exchange, transpose: Exchange
    ) -> Tensor:
        ctx.group = group
        ctx.transpose = transpose
        return exchange(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.transpose(grads[0], ctx.group), None, None, None


# The names are those of Megatron-LM's regions (megatron/core/tensor_parallel/mappings.py).


def copy_to_tp(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return `x`. The backward sums the gradients of all ranks.

    Every rank has the whole of `x` and uses it differently.
    """
    return _apply(x, group, _view, _all_reduce)


def reduce_from_tp(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the results of all ranks. The backward passes the gradient unchanged."""
    return _apply(x, group, _all_reduce, _same)


def gather_seq(x_BtD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the tokens of all ranks, for different use by each rank: [B, t, D] -> [B, T, D].

    The backward sums the gradients over the ranks. Each rank gets those of its tokens.
    """
    return _apply(x_BtD, group, _all_gather, _reduce_scatter)


def reduce_scatter_seq(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the results of all ranks, and keep this rank's tokens: [B, T, D] -> [B, t, D]."""
    return _apply(x_BTD, group, _reduce_scatter, _all_gather)


def scatter_seq(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Keep this rank's tokens of a tensor that all ranks have whole: [B, T, D] -> [B, t, D]."""
    return _apply(x_BTD, group, _local_tokens, _all_gather)


def gather_seq_replicated(x_BtD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the tokens of all ranks, for the same use by each rank: [B, t, D] -> [B, T, D].

    In the backward each rank keeps the gradients of its tokens.
    """
    return _apply(x_BtD, group, _all_gather, _local_tokens)


def _apply(x: Tensor, group: dist.ProcessGroup, exchange: Exchange, transpose: Exchange) -> Tensor:
    y: Tensor = _Exchange.apply(x, group, exchange, transpose)
    return y


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return all_reduce_async(x, group)()


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return all_gather_async(x, group)()


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return reduce_scatter_async(x, group)()


def _local_tokens(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    return x_BTD.chunk(n, dim=1)[rank].contiguous()


def _view(x: Tensor, _group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)  # an autograd function should not return its input itself


def _same(x: Tensor, _group: dist.ProcessGroup) -> Tensor:
    return x


class ColumnParallelMatmul(torch.autograd.Function):
    """x W^T, if each rank has some rows of W: [B, T, D] -> [B, T, O].

    The all-reduce of the input's gradient overlaps the computation of the weight's gradient. With
    `sequence`, x has only this rank's tokens, [B, t, D]. The forward gathers all tokens for the
    product and saves only this rank's. The backward gathers them again while it computes the
    input's gradient (Korthikanti et al. 2022).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OD: Tensor, group: dist.ProcessGroup, sequence: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OD)
        ctx.group = group
        ctx.sequence = sequence
        whole = all_gather_async(x, group)() if sequence else x
        return whole @ weight_OD.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight_OD = ctx.saved_tensors
        grad_BTO = grads[0]
        input_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        gathers = ctx.sequence and weight_needs_grad
        gathered = all_gather_async(x, ctx.group) if gathers else lambda: x
        summed: Finish | None = None
        grad_weight = None
        if input_needs_grad:
            start = reduce_scatter_async if ctx.sequence else all_reduce_async
            grad_x = grad_BTO @ weight_OD
            whole = gathered()
            summed = start(grad_x, ctx.group)
        else:
            whole = gathered()
        if weight_needs_grad:
            grad_weight = grad_BTO.flatten(0, 1).t() @ whole.flatten(0, 1)
        return summed() if summed else None, grad_weight, None, None
