"""Cross entropy fused with the output head: full logits never exist.

The forward computes the logits of one chunk of rows after the other. It turns a chunk into its
gradient in place, and multiplies that into the gradients of the hidden states and the weight. So
one chunk of logits is in memory, instead of [B x T, V] twice. The idea is that of Cut
Cross-Entropy (Wijmans et al. 2024) and Liger Kernel, here with plain matrix products. Gradients
stay those of the sum until the backward scales them. So fp16 does not underflow before its loss
scale is applied.

The work between the products is bound by memory. Compiled, it takes two passes, which also convert
half-precision logits to fp32. Eager, it is a few operations in place.

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
    """A rank's rows of the vocabulary, and reductions over the tensor ranks.

    Attributes:
        first: token id of the first row.
        unpadded_rows: number of rows that are tokens. The rows after them are padding.
        vocab_size: number of tokens of the whole vocabulary.
    """

    first: int
    unpadded_rows: int
    vocab_size: int

    def all_reduce_max(self, values: Tensor) -> Tensor: ...

    def all_reduce_sum(self, values: Tensor) -> Tensor: ...


def statistics(logits_CV: Tensor, labels_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit, the sum of `exp(logit - largest)`, and `label's logit - largest`.

    For compilation. Eager, it copies the logits.

    Returns:
        fp32 [C, 1] each.
    """
    logits_CV = logits_CV.float()
    # the clamp is for ranks that hold only padding
    peak_C1 = logits_CV.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    total_C1 = (logits_CV - peak_C1).exp().sum(dim=-1, keepdim=True)
    return peak_C1, total_C1, logits_CV.gather(1, labels_C1) - peak_C1


def to_gradient(
    logits_CV: Tensor, labels_C1: Tensor, peak_C1: Tensor, scale_C1: Tensor, hit_C1: Tensor
) -> None:
    """Compute `exp(logits - peak) * scale`, minus `hit` at the label, in place. For compilation.

    The difference is computed in fp32, because half precision would round that of a likely label
    to zero.
    """
    column_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    grad_CV = (logits_CV.float() - peak_C1).exp() * scale_C1
    logits_CV.copy_(torch.where(column_V == labels_C1, grad_CV - hit_C1, grad_CV))


@dataclass(frozen=True)
class HeadOptions:
    """Options of a head's cross entropy.

    Attributes:
        shard: part of the vocabulary that the weight holds. None means the whole vocabulary.
        compiled: whether to compile the operations between the matrix products.
        smoothing: share of each target that is spread over the vocabulary (Szegedy et al. 2015).
            A bias is not smoothed.
    """

    shard: VocabularyShard | None = None
    compiled: bool = False
    smoothing: float = 0.0


def _reduce(
    logits_CV: Tensor, labels_C1: Tensor, hit_C1: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `statistics` over all shards. Eager, replace the logits by `exp(logits - peak)`.

    Args:
        hit_C1: zero if another shard has the label, or if the label does not count.
    """
    shard = options.shard
    if options.compiled:
        local_C1, total_C1, picked_C1 = _compiled()[0](logits_CV, labels_C1)
        peak_C1 = local_C1
        if shard is not None:
            peak_C1 = shard.all_reduce_max(local_C1.clone())
            total_C1 = total_C1 * (local_C1 - peak_C1).exp()
            picked_C1 = picked_C1 + (local_C1 - peak_C1)
    else:
        peak_C1 = logits_CV.amax(dim=-1, keepdim=True)
        if shard is not None:
            peak_C1 = shard.all_reduce_max(peak_C1)
        picked_C1 = logits_CV.sub_(peak_C1).gather(1, labels_C1)
        total_C1 = logits_CV.exp_().sum(dim=-1, keepdim=True)
    if shard is not None:
        both = torch.stack((picked_C1.where(hit_C1 > 0, 0.0), total_C1))
        picked_C1, total_C1 = shard.all_reduce_sum(both)
    return peak_C1, total_C1, picked_C1


@cache
def _compiled() -> tuple[Any, Any, Any]:
    # dynamic: chunks with fewer rows cause no recompilation
    return (
        torch.compile(statistics, dynamic=True, fullgraph=True),
        torch.compile(to_gradient, dynamic=True, fullgraph=True),
        torch.compile(accumulate, fullgraph=True),
    )


class _Smoothing:
    """Label smoothing: a share of the label's logit is replaced by the mean of all logits."""

    def __init__(self, share: float, weight_VD: Tensor, shard: VocabularyShard | None) -> None:
        self.share = share
        self.unpadded_rows = shard.unpadded_rows if shard else len(weight_VD)
        self.vocabulary = shard.vocab_size if shard else len(weight_VD)
        self.mean_D = (
            weight_VD[: self.unpadded_rows].sum(dim=0, dtype=torch.float32) / self.vocabulary
        )
        if shard is not None:
            self.mean_D = shard.all_reduce_sum(self.mean_D)

    def loss(self, hidden_CD: Tensor, logit_C1: Tensor) -> Tensor:
        """Return the loss that smoothing adds to the label's cross entropy."""
        return self.share * (logit_C1 - hidden_CD.float() @ self.mean_D[:, None])

    def add_gradient(self, grad_CV: Tensor, mask_C1: Tensor) -> None:
        """Add the gradient of the mean logit. The caller scales that of the label."""
        share_C1 = self.share / self.vocabulary * mask_C1
        grad_CV[:, : self.unpadded_rows] -= share_C1.to(grad_CV.dtype)


def accumulate(total_VD: Tensor, product_VD: Tensor) -> None:
    """Add a half-precision product to an fp32 sum.

    For compilation. Eager, it copies the product to fp32.
    """
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
        """Add a chunk's contribution to the gradients.

        Args:
            grad_CV: gradient of the chunk's logits.
        """
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
    """Give padding no probability. Return the labels' columns, and which labels this shard has."""
    if shard is None:
        return labels_C1, mask_C1
    logits_CV[:, shard.unpadded_rows :] = -torch.inf
    labels_C1 = labels_C1 - shard.first
    mine_C1 = (labels_C1 >= 0) & (labels_C1 < shard.unpadded_rows)
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
        ctx.grads = None  # they are scaled in place, so a second backward would be wrong
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
    """Return the sum of `logsumexp(h W^T) - (h W^T)[label]` over unmasked rows.

    The forward computes the gradients of the hidden states, the weight and the bias. They allow one
    backward.

    Returns:
        fp32 scalar, in nats.
    """
    others = (labels_R, mask_R, options or HeadOptions())
    loss: Tensor = FusedLinearCrossEntropy.apply(hidden_RD, weight_VD, bias_V, others)
    return loss
