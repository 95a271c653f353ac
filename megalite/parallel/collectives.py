"""Collectives of the ranks that share a model, each with its backward.

A collective is started and finished apart: what is computed in between hides it. Where
torch.compile traces, starting waits, and the compiler orders what it can.

B batch   T tokens   t tokens of one rank, T / ranks   D width   O outputs of a layer's part
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Finish = Callable[[], Tensor]


def start_sum(x: Tensor, group: dist.ProcessGroup) -> Finish:
    """The sum over the ranks, of `x`'s shape; `x` is left as it is."""
    # not in place: selective recompute keeps x, and would sum it a second time
    y = x.clone(memory_format=torch.contiguous_format)
    return _finish(dist.all_reduce(y, group=group, async_op=_may_wait()), lambda: y)


def start_gather(x_BtD: Tensor, group: dist.ProcessGroup) -> Finish:
    """The tokens of all ranks, in order of ranks: [B, t, D] -> [B, T, D]."""
    B, t, D = x_BtD.shape
    n = dist.get_world_size(group)
    y = x_BtD.new_empty((n * B, t, D))
    work = dist.all_gather_into_tensor(y, x_BtD.contiguous(), group=group, async_op=_may_wait())
    return _finish(work, lambda: y.view(n, B, t, D).transpose(0, 1).reshape(B, n * t, D))


def start_scatter_sum(x_BTD: Tensor, group: dist.ProcessGroup) -> Finish:
    """The rank's own tokens of the sum over the ranks: [B, T, D] -> [B, t, D]."""
    B, T, D = x_BTD.shape
    n = dist.get_world_size(group)
    parts = x_BTD.view(B, n, T // n, D).transpose(0, 1).contiguous().view(n * B, T // n, D)
    y = x_BTD.new_empty((B, T // n, D))
    work = dist.reduce_scatter_tensor(y, parts, group=group, async_op=_may_wait())
    return _finish(work, lambda: y, parts)


def _may_wait() -> bool:
    return not torch.compiler.is_compiling()


def _finish(work: Any, result: Finish, *_alive: Tensor) -> Finish:
    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return result()

    return finish


class Share(torch.autograd.Function):
    """What every rank reads whole: itself forward, the sum of its gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_sum(grads[0], ctx.group)(), None


class Sum(torch.autograd.Function):
    """What every rank has a part of: the sum over ranks forward, itself backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return start_sum(x, group)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class GatherTokens(torch.autograd.Function):
    """[B, t, D] -> [B, T, D], which ranks go on with in different ways: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x_BtD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return start_gather(x_BtD, group)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_scatter_sum(grads[0], ctx.group)(), None


class SumToTokens(torch.autograd.Function):
    """`Sum`, of which each rank keeps its tokens: [B, T, D] -> [B, t, D]."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return start_scatter_sum(x_BTD, group)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_gather(grads[0], ctx.group)(), None


class TakeTokens(torch.autograd.Function):
    """The rank's own tokens of what every rank has whole: [B, T, D] -> [B, t, D]."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        n, rank = dist.get_world_size(group), dist.get_rank(group)
        return x_BTD.chunk(n, dim=1)[rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_gather(grads[0], ctx.group)(), None


class AllTokens(torch.autograd.Function):
    """[B, t, D] -> [B, T, D], which every rank goes on with alike: its gradient is its own."""

    @staticmethod
    def forward(ctx: Any, x_BtD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return start_gather(x_BtD, group)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        n, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return grads[0].chunk(n, dim=1)[rank].contiguous(), None


class ColumnLinear(torch.autograd.Function):
    """x W^T, where every rank has other rows of W: [B, T, D] -> [B, T, O].

    The sum of the input's gradients over the ranks travels while the weight's gradient is made.
    With `tokens`, x is a rank's own tokens, [B, t, D]: they are gathered for the product, kept as
    they came, and gathered again in the backward while the input's gradient is made (Korthikanti et
    al. 2022).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OD: Tensor, group: dist.ProcessGroup, tokens: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OD)
        ctx.group, ctx.tokens = group, tokens
        whole = start_gather(x, group)() if tokens else x
        return whole @ weight_OD.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight_OD = ctx.saved_tensors
        grad_BTO = grads[0]
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        gathered = start_gather(x, ctx.group) if ctx.tokens and wants_weight else lambda: x
        summed: Finish | None = None
        grad_weight = None
        if wants_x:
            start = start_scatter_sum if ctx.tokens else start_sum
            grad_x = grad_BTO @ weight_OD
            whole = gathered()
            summed = start(grad_x, ctx.group)
        else:
            whole = gathered()
        if wants_weight:
            grad_weight = grad_BTO.flatten(0, 1).t() @ whole.flatten(0, 1)
        return summed() if summed else None, grad_weight, None, None
