"""Blocks and stacks of blocks: token ids to hidden states.

B batch   T tokens   S tokens of the encoder's text   D width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite import arch
from megalite.config import ModelConfig
from megalite.model.attention import Attention, CrossAttention, attention_mask
from megalite.model.cache import Cache, LayerCache
from megalite.model.linear import Embedding, VocabularyEmbedding
from megalite.model.mlp import MLP
from megalite.model.norms import make_norm
from megalite.model.positions import relative_position_buckets, rope_table, sinusoidal_positions
from megalite.model.regions import Regions

# hidden states of the encoder's text, [B, S, D], and a mask of those that are attended to, bool
# [B, 1, 1, S]; None means all
Memory = tuple[Tensor, Tensor | None]


class Block(nn.Module):
    """Residual branches: self-attention, cross-attention if `cross`, and the MLP.

    A pre-norm branch is x + f(norm(x)) (Xiong et al. 2020). A post-norm branch is norm(x + f(x))
    (Vaswani et al. 2017).
    """

    def __init__(self, config: ModelConfig, regions: Regions, *, causal: bool, cross: bool) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, regions, causal=causal)
        self.cross_attn = None
        if cross:
            self.cross_attn_layernorm = make_norm(config)
            self.cross_attn = CrossAttention(config, regions)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config, regions)
        self.dropout = config.hidden_dropout
        self.post = config.norm_position == "post"
        self._wrapped: Callable[..., Tensor] | None = None

    def wrap(self, wrapper: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
        """Wrap the computation of `forward`. A second call adds an outer wrapper.

        Hooks on the block, such as ZeRO-3's that fetch and release weights, stay outside of the
        wrappers.
        """
        self._wrapped = wrapper(self._wrapped or self._branches)

    def forward(self, *inputs: Tensor | Memory | LayerCache | None) -> Tensor:
        """Compute the branches. The inputs are those of `_branches`."""
        compute: Callable[..., Tensor] = self._wrapped or self._branches
        return compute(*inputs)

    def _branches(
        self,
        x_BTD: Tensor,
        rope: Tensor | None,
        mask: Tensor | None,
        memory: Memory | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        y_BTD = self.self_attn(self._branch_input(x_BTD, self.input_layernorm), rope, mask, cache)
        x_BTD = self._add_branch(x_BTD, y_BTD, self.input_layernorm)
        if self.cross_attn is not None:
            assert memory is not None
            norm = self.cross_attn_layernorm
            y_BTD = self.cross_attn(self._branch_input(x_BTD, norm), *memory, cache)
            x_BTD = self._add_branch(x_BTD, y_BTD, norm)
        y_BTD = self.mlp(self._branch_input(x_BTD, self.post_attention_layernorm))
        return self._add_branch(x_BTD, y_BTD, self.post_attention_layernorm)

    def _branch_input(self, x_BTD: Tensor, norm: nn.Module) -> Tensor:
        """Return the input of a branch."""
        return x_BTD if self.post else norm(x_BTD)

    def _add_branch(self, x_BTD: Tensor, y_BTD: Tensor, norm: nn.Module) -> Tensor:
        """Add the output of a branch to the stream."""
        if self.dropout:
            y_BTD = F.dropout(y_BTD, self.dropout, self.training)
        return norm(x_BTD + y_BTD) if self.post else x_BTD + y_BTD


class Stack(nn.Module):
    """Token ids to hidden states.

    Args:
        embeds: whether the stack owns the token embeddings. If false, pass them to `forward`.
    """

    def __init__(
        self,
        config: ModelConfig,
        regions: Regions,
        layers: int,
        *,
        embeds: bool,
        causal: bool,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.regions = regions
        self.causal = causal
        self._windows = arch.layer_windows(config, layers)
        self._dropout = bool(config.hidden_dropout or config.attention_dropout)
        D = config.hidden_size
        kind = config.position_embedding
        if embeds:
            self.embed_tokens = VocabularyEmbedding(config, regions)
        if kind == "learned":
            self.embed_positions = Embedding(config.max_position_embeddings, D)
        if config.type_vocab_size:
            self.embed_types = Embedding(config.type_vocab_size, D)
        if config.embedding_norm:
            self.embed_norm = make_norm(config)
        if kind == "relative":
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = Embedding(buckets, config.num_attention_heads)
        self.layers = nn.ModuleList(
            Block(config, regions, causal=causal, cross=cross) for _ in range(layers)
        )
        if config.norm_position == "pre":
            self.norm = make_norm(config)

    def forward(
        self,
        input_ids: Tensor,
        inputs: Mapping[str, Tensor],
        embed: nn.Module | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the hidden states: [B, T] -> [B, T, D].

        Args:
            inputs: position_ids, document_ids, attention_mask and token_type_ids, if needed. See
                `LanguageModel.hidden`.
            embed: the token embeddings, if the stack has none.
            memory: output of the encoder.
            cache: keys and values of the earlier tokens, to which those of `input_ids` are added.
        """
        T = input_ids.shape[1]
        past = cache.length if cache else 0
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + T, device=input_ids.device)
        x_BTD = self._embed(embed or self.embed_tokens, input_ids, positions, inputs)
        rope = None
        if self.config.position_embedding == "rope":
            rope = rope_table(positions, self.config)
        masks = {window: self._mask(window, x_BTD, past, inputs) for window in {*self._windows}}
        x_BTD = self.regions.scatter(x_BTD)
        dropout = self._dropout and self.training
        with self.regions.block_randomness(x_BTD, dropout=dropout):
            for index, block in enumerate(self.layers):
                layer_cache = cache.layers[index] if cache else None
                mask = masks[self._windows[index]]
                x_BTD = block(x_BTD, rope, mask, memory, layer_cache)
        if cache:
            cache.length += T
        return x_BTD if self.config.norm_position == "post" else self.norm(x_BTD)

    def _embed(
        self, embed: nn.Module, input_ids: Tensor, positions: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        config = self.config
        kind = self.config.position_embedding
        x_BTD: Tensor = embed(input_ids)
        if config.embedding_multiplier != 1:
            x_BTD = x_BTD * config.embedding_multiplier
        if config.type_vocab_size:
            types = inputs.get("token_type_ids")
            x_BTD = x_BTD + self.embed_types(
                torch.zeros_like(input_ids) if types is None else types
            )
        if kind == "learned":
            x_BTD = x_BTD + self.embed_positions(positions)
        elif kind == "sinusoidal":
            x_BTD = x_BTD + sinusoidal_positions(positions, config.hidden_size).to(x_BTD.dtype)
        if config.embedding_norm:
            x_BTD = self.embed_norm(x_BTD)
        if config.hidden_dropout:
            x_BTD = F.dropout(x_BTD, config.hidden_dropout, self.training)
        return x_BTD

    def _mask(
        self, window: int | None, x_BTD: Tensor, past: int, inputs: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Return the mask of the blocks with a window. See `attention_mask`.

        Args:
            past: number of tokens before those of `x_BTD`.
        """
        T = x_BTD.shape[1]
        is_relative = self.config.position_embedding == "relative"
        mask = attention_mask(
            T,
            past + T,
            causal=self.causal,
            window=window,
            document_ids=inputs.get("document_ids"),
            keys=inputs.get("attention_mask"),
            device=x_BTD.device,
            explicit=is_relative,
        )
        return self._with_bias(mask, T, past + T).to(x_BTD.dtype) if is_relative else mask

    def _with_bias(self, mask: Tensor | None, queries: int, keys: int) -> Tensor:
        """Return T5's relative position biases of each head, with -inf where `mask` is false."""
        device = self.relative_attention_bias.weight.device
        buckets = relative_position_buckets(
            queries, keys, self.config, causal=self.causal, device=device
        )
        bias_1NTT = self.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        if mask is None:
            return bias_1NTT
        return bias_1NTT.masked_fill(~mask, -math.inf)
