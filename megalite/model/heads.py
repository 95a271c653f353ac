"""What a model ends in: the next or hidden tokens' scores with their loss, or a label's.

B batch   T tokens   D width   V vocabulary   C labels
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config import ModelConfig
from megalite.model.layers import ACTIVATIONS, Linear, make_norm
from megalite.model.loss import FusedLinearCrossEntropy, Shard


class Classifier(nn.Module):
    """A label's score from one token's hidden state, or from the mean of all.

    Attributes:
        label_smoothing: share of a target that is spread over all labels, in training.
        class_weights: factor of each label's loss in training, [C].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_labels, config.hidden_size))
        self.pooling, self.dropout = config.classifier_pooling, config.hidden_dropout
        self.label_smoothing = 0.0
        self.class_weights: Tensor | None = None

    def forward(self, hidden_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, T, D] -> fp32 [B, C]."""
        B, T, _ = hidden_BTD.shape
        if self.pooling == "mean":
            seen_BT = torch.arange(T, device=hidden_BTD.device) < lengths_B[:, None]
            sums_BD = (hidden_BTD * seen_BT[..., None]).sum(dim=1, dtype=torch.float32)
            pooled_BD = (sums_BD / lengths_B[:, None]).to(hidden_BTD.dtype)
        elif self.pooling == "last":
            pooled_BD = hidden_BTD[torch.arange(B, device=hidden_BTD.device), lengths_B - 1]
        else:
            pooled_BD = hidden_BTD[:, 0]
        pooled_BD = F.dropout(pooled_BD, self.dropout, self.training)
        return F.linear(pooled_BD, self.weight).float()

    def loss(self, scores_BC: Tensor, labels_B: Tensor, mask_B: Tensor) -> Tensor:
        """Sum of the cross entropy over samples with mask: fp32 scalar, nats."""
        weights, smoothing = self.class_weights, self.label_smoothing
        if not self.training:
            weights, smoothing = None, 0.0
        losses_B = F.cross_entropy(
            scores_BC, labels_B, weight=weights, label_smoothing=smoothing, reduction="none"
        )
        return (losses_B * mask_B).sum()


class Transform(nn.Module):
    """What BERT does to a hidden state before it names the token (Devlin et al. 2018)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.norm = make_norm(config)
        self.activation = config.activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = self.norm(ACTIVATIONS[self.activation](self.dense(x_BTD)))
        return y


class Head(nn.Module):
    """The output head; its forward is the loss, so that ZeRO-3 gathers its weights for it."""

    weight: nn.Parameter | None

    def __init__(self, config: ModelConfig, *, bias: bool) -> None:
        super().__init__()
        V, D = config.vocab_size, config.hidden_size
        self.weight = None if config.tie_word_embeddings else nn.Parameter(torch.empty(V, D))
        self.bias = nn.Parameter(torch.empty(V)) if bias else None

    def forward(
        self,
        hidden_BTD: Tensor,
        labels_BT: Tensor | None,
        mask_BT: Tensor | None,
        loss: Callable[..., Tensor],
        tied_VD: Tensor | None = None,
    ) -> Tensor:
        weight = self.weight if tied_VD is None else tied_VD
        if self.bias is None:
            return loss(hidden_BTD, weight, labels_BT, mask_BT)
        return loss(hidden_BTD, weight, labels_BT, mask_BT, bias_V=self.bias)


def head_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    mask_BT: Tensor,
    shard: Shard | None = None,
    *,
    bias_V: Tensor | None = None,
    chosen_R: Tensor | None = None,
    compiled: bool = False,
    smoothing: float = 0.0,
) -> Tensor:
    """The fused head and cross entropy over flattened rows.

    Args:
        chosen_R: the rows it is computed for, among them all that count; None: every row.
        shard: where W is a part of the vocabulary's rows.
        compiled: whether what happens between the matrix products is.
        smoothing: share of each target that is spread over the vocabulary, in training.
    """
    rows = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    if not torch.is_grad_enabled():  # an autograd function is told of the weight's wish regardless
        weight_VD = weight_VD.detach()
        bias_V, smoothing = None if bias_V is None else bias_V.detach(), 0.0
    labels_R, mask_R = labels_BT.reshape(-1), mask_BT.reshape(-1)
    if chosen_R is not None:
        rows = rows.index_select(0, chosen_R)
        labels_R, mask_R = labels_R[chosen_R], mask_R[chosen_R]
    loss: Tensor = FusedLinearCrossEntropy.apply(
        rows, weight_VD, labels_R, mask_R, shard, compiled, bias_V, smoothing
    )
    return loss
