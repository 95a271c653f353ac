"""Cross entropy fused with the output head: full logits never exist.

For each run of rows the logits are made, turned into the gradient in place, multiplied into the
gradients of the hidden states and of the weight, and forgotten. The forward thus holds one chunk of
logits instead of [B x T, V] twice (the idea of Cut Cross-Entropy, Wijmans et al. 2024, and Liger
Kernel, written for plain matrix products). Gradients are unnormalised (those of the sum) until the
backward scales them, so that fp16 does not underflow before its loss scale is applied.

R rows (B x T)   C rows of a chunk   D width   V vocabulary
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 25  # fp32 logits alive at a time: 128 MiB


class Shard(Protocol):
    """A part of the vocabulary's rows, and sums over all parts (`megalite.parallel.tensor`)."""

    first: int
    held: int

    def largest(self, values: Tensor) -> Tensor: ...

    def total(self, values: Tensor) -> Tensor: ...


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Sum over the rows with mask of `logsumexp(h W^T) - (h W^T)[label]`, in nats, fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        mask_R: Tensor,
        shard: Shard | None = None,
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_RD) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_RD.device)
        rows = chunk_rows(weight_VD.shape[0])
        for start in range(0, hidden_RD.shape[0], rows):
            chunk = slice(start, start + rows)
            h_CD, labels_C1 = hidden_RD[chunk], labels_R[chunk, None]
            mask_C1 = mask_R[chunk, None].float()
            logits_CV = (h_CD @ weight_VD.t()).float()
            hit_C1 = mask_C1
            if shard is not None:
                logits_CV[:, shard.held :] = -torch.inf  # padding has no probability
                labels_C1 = labels_C1 - shard.first
                mine_C1 = (labels_C1 >= 0) & (labels_C1 < shard.held)
                labels_C1, hit_C1 = labels_C1.where(mine_C1, 0), mask_C1 * mine_C1
            peak_C1 = logits_CV.amax(dim=-1, keepdim=True)
            if shard is not None:
                peak_C1 = shard.largest(peak_C1)
            logits_CV.sub_(peak_C1)
            picked_C1 = logits_CV.gather(1, labels_C1)
            total_C1 = logits_CV.exp_().sum(dim=-1, keepdim=True)
            if shard is not None:
                both = torch.stack((picked_C1.where(mine_C1, 0.0), total_C1))
                picked_C1, total_C1 = shard.total(both)
            loss += ((total_C1.log() - picked_C1) * mask_C1).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # softmax minus one at the label, zero where masked
            grad_CV = logits_CV.mul_(mask_C1 / total_C1)
            grad_CV.scatter_add_(1, labels_C1, -hit_C1)
            grad_CV = grad_CV.to(hidden_RD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[chunk])
            if grad_weight is not None:
                if grad_weight.dtype == hidden_RD.dtype:
                    grad_weight.addmm_(grad_CV.t(), h_CD)
                else:
                    grad_weight += grad_CV.t() @ h_CD
        ctx.grads = (grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        assert ctx.grads is not None, "a second backward through the fused loss"
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None  # scaled in place: they serve one backward
        if grad_hidden is not None:
            grad_hidden.mul_(scale)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def chunk_rows(vocabulary: int) -> int:
    """Rows whose fp32 logits fill a chunk, a multiple of 64 for the matrix product's sake."""
    return max(64, _CHUNK_ELEMENTS // vocabulary // 64 * 64)
