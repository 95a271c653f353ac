"""The decoder: embeddings, pre-norm blocks, a final norm, and a head fused with its loss.

Keys are those of Hugging Face's Llama, save for the projections that are fused in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite import shapes
from megalite.config import ModelConfig
from megalite.model.layers import MLP, Attention, make_norm, rope_table, sinusoids
from megalite.model.loss import FusedLinearCrossEntropy, Shard


class Embedding(nn.Module):
    """Rows of a table, chosen by index: [B, T] -> [B, T, D]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm: Xiong et al. 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = config.hidden_dropout

    def forward(self, x_BTD: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self._drop(self.self_attn(self.input_layernorm(x_BTD), rope, mask))
        return x_BTD + self._drop(self.mlp(self.post_attention_layernorm(x_BTD)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Decoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        config, kind = self.config, self.config.position_embedding
        x_BTD = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        rope = None
        if kind == "rope":
            rope = rope_table(position_ids, config.head_dim, config.rope_theta)
        elif kind == "learned":
            x_BTD = x_BTD + self.embed_positions(position_ids)
        elif kind == "sinusoidal":
            x_BTD = x_BTD + sinusoids(position_ids, config.hidden_size).to(x_BTD.dtype)
        if config.hidden_dropout:
            x_BTD = F.dropout(x_BTD, config.hidden_dropout, self.training)
        mask = None if document_ids is None else document_mask(document_ids)
        for block in self.layers:
            x_BTD = block(x_BTD, rope, mask)
        return self.norm(x_BTD)


class CausalLM(nn.Module):
    """The language model: `forward` gives the summed loss of a batch, `logits` the next tokens'."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.head_loss: Callable[..., Tensor] = head_loss
        if not config.tie_word_embeddings:
            self.lm_head = Head(config)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Sum of the cross entropy over the batch's unmasked targets: fp32 scalar, nats."""
        hidden_BTD = self.model(
            batch["input_ids"], batch.get("position_ids"), batch.get("document_ids")
        )
        labels, mask = batch["labels"], batch["loss_mask"]
        if self.config.tie_word_embeddings:
            weight = self.model.embed_tokens.weight
            return self.head_loss(hidden_BTD, weight, labels, mask)
        return self.lm_head(hidden_BTD, labels, mask, self.head_loss)

    def logits(self, input_ids: Tensor, *, last_only: bool = False) -> Tensor:
        """fp32 scores of the next token, [B, T, V], or [B, V] of the last position alone."""
        hidden_BTD = self.model(input_ids, None, None)
        if last_only:
            hidden_BTD = hidden_BTD[:, -1]
        tied = self.config.tie_word_embeddings
        weight = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return F.linear(hidden_BTD, weight).float()


class Head(nn.Module):
    """An untied output head; its forward is the loss, so that ZeRO-3 gathers its weight for it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(
        self,
        hidden_BTD: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        loss: Callable[..., Tensor],
    ) -> Tensor:
        return loss(hidden_BTD, self.weight, labels_BT, mask_BT)


def head_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    mask_BT: Tensor,
    shard: Shard | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """The fused head and cross entropy over flattened rows.

    Args:
        shard: where W is a part of the vocabulary's rows.
        compiled: whether what happens between the matrix products is.
    """
    rows = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    if not torch.is_grad_enabled():  # an autograd function is told of the weight's wish regardless
        weight_VD = weight_VD.detach()
    loss: Tensor = FusedLinearCrossEntropy.apply(
        rows, weight_VD, labels_BT.reshape(-1), mask_BT.reshape(-1), shard, compiled
    )
    return loss


def document_mask(document_ids_BT: Tensor) -> Tensor:
    """Causal attention within documents: bool [B, 1, T, T], true where a query may look."""
    T = document_ids_BT.shape[1]
    same = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=same.device).tril()
    return (same & causal)[:, None]


def build(config: ModelConfig) -> CausalLM:
    """An uninitialised model whose parameters agree, one by one, with the table of shapes."""
    model = CausalLM(config)
    built = [name for name, _ in model.named_parameters()]
    table = [parameter.name for parameter in shapes.parameters(config)]
    assert built == table, f"model and table of shapes disagree: {set(built) ^ set(table)}"
    return model
