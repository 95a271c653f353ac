"""The output of a model: logits and loss of tokens, or logits of labels.

B batch   T tokens   D width   V vocabulary   R rows of [B x T]   C labels
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite import registry
from megalite.config import ModelConfig
from megalite.model.linear import Linear
from megalite.model.loss import HeadOptions, VocabularyShard, linear_cross_entropy
from megalite.model.norms import make_norm
from megalite.model.regions import Regions


class Classifier(nn.Module):
    """The logits of labels, from one token's hidden state or from the mean of all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_labels, config.hidden_size))
        self.pooling = config.classifier_pooling
        self.dropout = config.hidden_dropout

    def forward(self, hidden_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the logits of the labels: [B, T, D] -> fp32 [B, C].

        Args:
            lengths_B: number of tokens of each sample. The rest is padding.
        """
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


class Transform(nn.Module):
    """BERT's layer between the last block and the head (Devlin et al. 2018)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.norm = make_norm(config)
        self.activate = registry.activations.load(config.activation)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = self.norm(self.activate(self.dense(x_BTD)))
        return y


class Head(nn.Module):
    """The output layer over the vocabulary, with its own weight or the embedding's.

    `forward` runs a method of the head. So an engine's hooks (ZeRO-3) gather the weights before the
    method and release them after it.
    """

    weight: nn.Parameter | None

    def __init__(self, config: ModelConfig, regions: Regions, *, bias: bool) -> None:
        super().__init__()
        self.regions = regions
        V, D = config.vocab_size, config.hidden_size
        self.weight = None if config.tie_word_embeddings else nn.Parameter(torch.empty(V, D))
        self.bias = nn.Parameter(torch.empty(V)) if bias else None

    def forward(self, method: Callable[..., Tensor], *args: object, **options: object) -> Tensor:
        return method(self, *args, **options)

    def loss(
        self,
        hidden_BTD: Tensor,
        tied_VD: Tensor | None,
        labels_BT: Tensor,
        mask_BT: Tensor,
        *,
        rows_R: Tensor | None,
        smoothing: float,
        compiled: bool,
    ) -> Tensor:
        """Return the sum of the cross entropy over unmasked tokens. See `head_loss`.

        Args:
            tied_VD: the embedding's weight, if the head has none.
        """
        return head_loss(
            self.regions.copy(hidden_BTD),
            self._pick(tied_VD),
            labels_BT,
            mask_BT,
            self.regions.vocabulary,
            bias_V=self.bias,
            rows_R=rows_R,
            compiled=compiled,
            smoothing=smoothing,
        )

    def logits(self, hidden: Tensor, tied_VD: Tensor | None) -> Tensor:
        """Return this rank's logits of hidden states: [..., D] -> [..., V]."""
        return F.linear(hidden, self._pick(tied_VD), self.bias)

    def _pick(self, tied_VD: Tensor | None) -> Tensor:
        weight = self.weight if tied_VD is None else tied_VD
        assert weight is not None
        return weight


def head_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    mask_BT: Tensor,
    shard: VocabularyShard | None = None,
    *,
    bias_V: Tensor | None = None,
    rows_R: Tensor | None = None,
    compiled: bool = False,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the sum of the cross entropy over unmasked tokens, fused with the head.

    Args:
        mask_BT: whether a token counts.
        shard: part of the vocabulary that the weight holds. None means the whole vocabulary.
        rows_R: rows of [B x T] to compute, which must include all unmasked rows. None means all.
        compiled: whether to compile the operations between the matrix products.
        smoothing: share of each target that is spread over the vocabulary in training.
    Returns:
        fp32 scalar, in nats.
    """
    rows = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad: detach to save work
        weight_VD = weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
        smoothing = 0.0
    labels_R, mask_R = labels_BT.reshape(-1), mask_BT.reshape(-1)
    if rows_R is not None:
        rows = rows.index_select(0, rows_R)
        labels_R, mask_R = labels_R[rows_R], mask_R[rows_R]
    options = HeadOptions(shard=shard, compiled=compiled, smoothing=smoothing)
    return linear_cross_entropy(rows, weight_VD, labels_R, mask_R, bias_V=bias_V, options=options)
