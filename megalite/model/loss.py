"""Cross entropy fused with the output head: full logits never exist.

For each chunk of rows the logits are computed, turned into the gradient in place, multiplied into
the gradients of the hidden states and of the weight, and dropped. The forward holds one chunk
of logits instead of [B x T, V] twice (the idea of Cut Cross-Entropy, Wijmans et al. 2024, and Liger
Kernel, written for plain matrix products). Gradients are unnormalised (those of the sum) until the
backward scales them, so that fp16 does not underflow before its loss scale is applied.

Between the products only memory traffic remains. Compiled, it is two passes, which also widen
logits of half precision. Eager, it is a handful of operations in place.

R rows (B x T)   C rows of a chunk   D width   V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """Return the largest logit, the sum of exponentials and the label's logit relative to it.

    Made for compilation: eager, it copies the logits.

    Returns:
        fp32 [C, 1] each.
    """
    logits_CV = logits_CV.float()
    # a rank may hold only padding
    peak_C1 = logits_CV.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    total_C1 = (logits_CV - peak_C1).exp().sum(dim=-1, keepdim=True)
    return peak_C1, total_C1, logits_CV.gather(1, labels_C1) - peak_C1


def to_gradient(
    logits_CV: Tensor, labels_C1: Tensor, peak_C1: Tensor, scale_C1: Tensor, hit_C1: Tensor
) -> None:
    """Compute `exp(logits - peak) * scale`, minus `hit` at the label, in place; for compilation.

    The difference is taken in fp32: half precision would leave nothing of a likely label's.
    """
    column_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    grad_CV = (logits_CV.float() - peak_C1).exp() * scale_C1
    logits_CV.copy_(torch.where(column_V == labels_C1, grad_CV - hit_C1, grad_CV))


@dataclass(frozen=True)
class HeadOptions:
    """How the cross entropy of a head is computed.

    Attributes:
        shard: the part of the vocabulary whose rows the weight holds. None means all of it.
        compiled: whether what happens between the matrix products is compiled.
        smoothing: the share of each target that is spread over the vocabulary (Szegedy et al.
            2015). A bias is not smoothed.
    """

    shard: VocabularyShard | None = None
    compiled: bool = False
    smoothing: float = 0.0


def _reduce(
    logits_CV: Tensor, labels_C1: Tensor, hit_C1: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `statistics` over all shards; if eager, leave `exp(logits - peak)` in place.

    Args:
        hit_C1: zero if another shard has the label, or if it does not count.
    """
    shard = options.shard
    if options.compiled:
        local_C1, total_C1, picked_C1 = _compiled()[0](logits_CV, labels_C1)
        peak_C1 = local_C1
        if shard is not None:
            peak_C1 = shard.largest(local_C1.clone())
            total_C1 = total_C1 * (local_C1 - peak_C1).exp()
            picked_C1 = picked_C1 + (local_C1 - peak_C1)
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
    # dynamic: a last chunk or an evaluation of fewer rows is not compiled again
    return (
        torch.compile(statistics, dynamic=True, fullgraph=True),
        torch.compile(to_gradient, dynamic=True, fullgraph=True),
        torch.compile(accumulate, fullgraph=True),
    )


class _Smoothing:
    """The share of the label's logit that becomes the mean of all logits."""

    def __init__(self, share: float, weight_VD: Tensor, shard: VocabularyShard | None) -> None:
        self.share = share
        self.held = shard.held if shard else len(weight_VD)
        self.vocabulary = shard.vocab_size if shard else len(weight_VD)
        self.mean_D = weight_VD[: self.held].sum(dim=0, dtype=torch.float32) / self.vocabulary
        if shard is not None:
            self.mean_D = shard.total(self.mean_D)

    def loss(self, hidden_CD: Tensor, logit_C1: Tensor) -> Tensor:
        """Return what smoothing adds to the cross entropy of the label."""
        return self.share * (logit_C1 - hidden_CD.float() @ self.mean_D[:, None])

    def add_gradient(self, grad_CV: Tensor, mask_C1: Tensor) -> None:
        """Add the gradient of the spread share; the label's own is scaled elsewhere."""
        share_C1 = self.share / self.vocabulary * mask_C1
        grad_CV[:, : self.held] -= share_C1.to(grad_CV.dtype)


def accumulate(total_VD: Tensor, product_VD: Tensor) -> None:
    """Add a half-precision product to an fp32 sum; for compilation: eager, it is copied to fp32."""
    total_VD.add_(product_VD)


class _Gradients:
    """The gradients of a head's inputs, added up chunk by chunk."""

    def __init__(
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        needed: tuple[bool, ...],
        *,
        compiled: bool,
    ) -> None:
        self._weight_VD = weight_VD
        self._compiled = compiled
        self.bias = self.hidden = self.weight = None
        if bias_V is not None and needed[2]:
            self.bias = torch.zeros_like(bias_V, dtype=torch.float32)
        if needed[0]:
            self.hidden = torch.empty_like(hidden_RD)
        if needed[1]:
            self.weight = torch.empty_like(weight_VD, dtype=torch.float32)
        self.needed = self.hidden is not None or self.weight is not None

    def add(self, grad_CV: Tensor, hidden_CD: Tensor, chunk: slice) -> None:
        """Add the products of a chunk with the gradient of its logits."""
        if self.bias is not None:
            self.bias += grad_CV.sum(dim=0, dtype=torch.float32)
        if self.hidden is not None:
            torch.mm(grad_CV, self._weight_VD, out=self.hidden[chunk])
        if self.weight is None:
            return
        first = chunk.start == 0
        if self.weight.dtype == hidden_CD.dtype:  # the first product overwrites
            self.weight.addmm_(grad_CV.t(), hidden_CD, beta=int(not first))
        elif first:
            self.weight.copy_(grad_CV.t() @ hidden_CD)
        else:
            add = _compiled()[2] if self._compiled else accumulate
            add(self.weight, grad_CV.t() @ hidden_CD)


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *, wide: bool) -> Tensor:
    """Return the logits of a chunk, in fp32 if `wide`."""
    logits_CV = hidden_CD @ weight_VD.t()
    if bias_V is not None:
        logits_CV += bias_V
    return logits_CV.float() if wide else logits_CV


def _to_shard(
    logits_CV: Tensor, labels_C1: Tensor, mask_C1: Tensor, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor]:
    """Give padding no probability; return the labels' local columns, and which count here."""
    if shard is None:
        return labels_C1, mask_C1
    logits_CV[:, shard.held :] = -torch.inf
    labels_C1 = labels_C1 - shard.first
    mine_C1 = (labels_C1 >= 0) & (labels_C1 < shard.held)
    return labels_C1.where(mine_C1, 0), mask_C1 * mine_C1


class FusedLinearCrossEntropy(torch.autograd.Function):
    """The function behind `linear_cross_entropy`.

    Args of `apply`: hidden, weight, bias, and a tuple of labels, mask and options.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        others: tuple[Tensor, Tensor, HeadOptions],
    ) -> Tensor:
        labels_R, mask_R, options = others
        compiled = options.compiled
        smoothing = options.smoothing
        spread = _Smoothing(smoothing, weight_VD, options.shard) if smoothing else None
        needed = ctx.needs_input_grad
        grads = _Gradients(hidden_RD, weight_VD, bias_V, needed, compiled=compiled)
        loss = hidden_RD.new_zeros((), dtype=torch.float32)
        rows = chunk_rows(len(weight_VD))
        for start in range(0, hidden_RD.shape[0], rows):
            chunk = slice(start, start + rows)
            h_CD = hidden_RD[chunk]
            mask_C1 = mask_R[chunk, None].float()
            logits_CV = _logits(h_CD, weight_VD, bias_V, wide=not compiled)
            labels_C1 = labels_R[chunk, None]
            labels_C1, hit_C1 = _to_shard(logits_CV, labels_C1, mask_C1, options.shard)
            peak_C1, total_C1, picked_C1 = _reduce(logits_CV, labels_C1, hit_C1, options)
            losses_C1 = total_C1.log() - picked_C1
            if spread is not None:
                losses_C1 += spread.loss(h_CD, picked_C1 + peak_C1)
                hit_C1 = (1 - smoothing) * hit_C1
            loss += (losses_C1 * mask_C1).sum()
            if not grads.needed:
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
            grads.add(grad_CV, h_CD, chunk)
        ctx.grads = (grads.hidden, grads.weight, grads.bias)
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
        return grad_hidden, grad_weight, grad_bias, None


def linear_cross_entropy(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    mask_R: Tensor,
    *,
    bias_V: Tensor | None = None,
    options: HeadOptions | None = None,
) -> Tensor:
    """Sum `logsumexp(h W^T) - (h W^T)[label]` over the rows with mask: fp32 scalar, nats.

    Gradients of the hidden states, the weight and the bias are computed in the forward, and serve
    one backward.
    """
    others = (labels_R, mask_R, options or HeadOptions())
    loss: Tensor = FusedLinearCrossEntropy.apply(hidden_RD, weight_VD, bias_V, others)
    return loss
