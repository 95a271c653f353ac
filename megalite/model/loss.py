"""Cross entropy fused with the output head: full logits never exist.

For each run of rows the logits are made, turned into the gradient in place, multiplied into the
gradients of the hidden states and of the weight, and forgotten. The forward thus holds one chunk of
logits instead of [B x T, V] twice (the idea of Cut Cross-Entropy, Wijmans et al. 2024, and Liger
Kernel, written for plain matrix products). Gradients are unnormalised (those of the sum) until the
backward scales them, so that fp16 does not underflow before its loss scale is applied.

What is done to the logits between the products is memory traffic alone. Compiled, it is two passes,
and half-precision logits are widened on the way; otherwise a handful of operations in place.

R rows (B x T)   C rows of a chunk   D width   V vocabulary
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite.arch import chunk_rows


class VocabularyShard(Protocol):
    """A part of the vocabulary's rows, and reductions over the ranks that hold the others."""

    first: int
    held: int
    vocab_size: int

    def largest(self, values: Tensor) -> Tensor: ...

    def total(self, values: Tensor) -> Tensor: ...


def statistics(logits_CV: Tensor, labels_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit, the sum of the exponentials above it, the label's logit above it.

    fp32 [C, 1] each. Made for compilation: eager, it makes copies of the logits.
    """
    logits_CV = logits_CV.float()
    # a rank's rows may be padding alone
    peak_C1 = logits_CV.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    total_C1 = (logits_CV - peak_C1).exp().sum(dim=-1, keepdim=True)
    return peak_C1, total_C1, logits_CV.gather(1, labels_C1) - peak_C1


def to_gradient(
    logits_CV: Tensor, labels_C1: Tensor, peak_C1: Tensor, scale_C1: Tensor, hit_C1: Tensor
) -> None:
    """`exp(logits - peak) * scale`, less `hit` at the label, in place; made for compilation.

    The difference is taken in fp32: of a likely label, half precision would leave nothing.
    """
    column_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    grad_CV = (logits_CV.float() - peak_C1).exp() * scale_C1
    logits_CV.copy_(torch.where(column_V == labels_C1, grad_CV - hit_C1, grad_CV))


def _whole(
    logits_CV: Tensor,
    labels_C1: Tensor,
    hit_C1: Tensor,
    shard: VocabularyShard | None,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`statistics` over all shards; not compiled, `exp(logits - peak)` is left in place.

    hit_C1: zero where the label counts on another shard, or nowhere.
    """
    if compiled:
        own_C1, total_C1, picked_C1 = _compiled()[0](logits_CV, labels_C1)
        peak_C1 = own_C1
        if shard is not None:
            peak_C1 = shard.largest(own_C1.clone())
            total_C1 = total_C1 * (own_C1 - peak_C1).exp()
            picked_C1 = picked_C1 + (own_C1 - peak_C1)
    else:
        peak_C1 = logits_CV.amax(dim=-1, keepdim=True)
        if shard is not None:
            peak_C1 = shard.largest(peak_C1)
        picked_C1 = logits_CV.sub_(peak_C1).gather(1, labels_C1)
        total_C1 = logits_CV.exp_().sum(dim=-1, keepdim=True)
    if shard is not None:
        both = torch.stack((picked_C1.where(hit_C1 > 0, 0.0), total_C1))
        picked_C1, total_C1 = shard.total(both)
    return peak_C1, total_C1, picked_C1


@cache
def _compiled() -> tuple[Any, Any, Any]:
    # dynamic: a last chunk or an evaluation of fewer rows is not compiled anew
    return (
        torch.compile(statistics, dynamic=True, fullgraph=True),
        torch.compile(to_gradient, dynamic=True, fullgraph=True),
        torch.compile(accumulate, fullgraph=True),
    )


class _Smoothing:
    """A part of the label's logit that becomes the mean of all logits (Szegedy et al. 2015)."""

    def __init__(self, part: float, weight_VD: Tensor, shard: VocabularyShard | None) -> None:
        self.part, self.held = part, shard.held if shard else len(weight_VD)
        self.vocabulary = shard.vocab_size if shard else len(weight_VD)
        self.mean_D = weight_VD[: self.held].sum(dim=0, dtype=torch.float32) / self.vocabulary
        if shard is not None:
            self.mean_D = shard.total(self.mean_D)

    def loss(self, hidden_CD: Tensor, logit_C1: Tensor) -> Tensor:
        """What is added to the cross entropy of the label."""
        return self.part * (logit_C1 - hidden_CD.float() @ self.mean_D[:, None])

    def add_gradient(self, grad_CV: Tensor, mask_C1: Tensor) -> None:
        """What is added to its gradient, beside a label that weighs less."""
        share_C1 = self.part / self.vocabulary * mask_C1
        grad_CV[:, : self.held] -= share_C1.to(grad_CV.dtype)


def accumulate(total_VD: Tensor, product_VD: Tensor) -> None:
    """Add a half-precision product to an fp32 sum; eager, it is copied to fp32 as a whole first."""
    total_VD.add_(product_VD)


def _add_product(
    total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor, first: bool, compiled: bool
) -> None:
    if total_VD.dtype == hidden_CD.dtype:  # the first product overwrites
        total_VD.addmm_(grad_CV.t(), hidden_CD, beta=int(not first))
    elif first:
        total_VD.copy_(grad_CV.t() @ hidden_CD)
    else:
        add = _compiled()[2] if compiled else accumulate
        add(total_VD, grad_CV.t() @ hidden_CD)


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Sum over the rows with mask of `logsumexp(h W^T) - (h W^T)[label]`, in nats, fp32.

    `smoothing` spreads a share of the target over the vocabulary; a bias knows of none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        mask_R: Tensor,
        shard: VocabularyShard | None = None,
        compiled: bool = False,
        bias_V: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> Tensor:
        spread = _Smoothing(smoothing, weight_VD, shard) if smoothing else None
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_bias = None
        if bias_V is not None and ctx.needs_input_grad[6]:
            grad_bias = torch.zeros_like(bias_V, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_RD) if wants_hidden else None
        grad_weight = torch.empty_like(weight_VD, dtype=torch.float32) if wants_weight else None
        loss, rows = hidden_RD.new_zeros((), dtype=torch.float32), chunk_rows(len(weight_VD))
        for start in range(0, hidden_RD.shape[0], rows):
            chunk = slice(start, start + rows)
            h_CD, labels_C1 = hidden_RD[chunk], labels_R[chunk, None]
            mask_C1 = mask_R[chunk, None].float()
            logits_CV = h_CD @ weight_VD.t()
            if bias_V is not None:
                logits_CV += bias_V
            if not compiled:
                logits_CV = logits_CV.float()
            hit_C1 = mask_C1
            if shard is not None:
                logits_CV[:, shard.held :] = -torch.inf  # padding has no probability
                labels_C1 = labels_C1 - shard.first
                mine_C1 = (labels_C1 >= 0) & (labels_C1 < shard.held)
                labels_C1, hit_C1 = labels_C1.where(mine_C1, 0), mask_C1 * mine_C1
            peak_C1, total_C1, picked_C1 = _whole(logits_CV, labels_C1, hit_C1, shard, compiled)
            losses_C1 = total_C1.log() - picked_C1
            if spread is not None:
                losses_C1 += spread.loss(h_CD, picked_C1 + peak_C1)
                hit_C1 = (1 - smoothing) * hit_C1
            loss += (losses_C1 * mask_C1).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # softmax minus one at the label, zero where masked
            if compiled:
                _compiled()[1](logits_CV, labels_C1, peak_C1, mask_C1 / total_C1, hit_C1)
                grad_CV = logits_CV
            else:
                grad_CV = logits_CV.mul_(mask_C1 / total_C1)
                grad_CV = grad_CV.scatter_add_(1, labels_C1, -hit_C1).to(hidden_RD.dtype)
            if spread is not None:
                spread.add_gradient(grad_CV, mask_C1)
            if grad_bias is not None:
                grad_bias += grad_CV.sum(dim=0, dtype=torch.float32)
            if grad_hidden is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, grad_CV, h_CD, start == 0, compiled)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        assert ctx.grads is not None, "a second backward through the fused loss"
        grad_hidden, grad_weight, grad_bias = ctx.grads
        ctx.grads = None  # scaled in place: they serve one backward
        if grad_hidden is not None:
            grad_hidden.mul_(scale)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.mul_(scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, grad_bias, None
