"""Every model: embeddings, one stack of blocks or two, and a head fused with its loss.

    decoder            each token sees those before it        the next token
    encoder            each token sees all                    the tokens that were hidden
    encoder_decoder    one text is read, another written      the text that was cut out

Keys are those of Hugging Face's Llama where it has one, save for the projections that are fused in
memory.

B batch   T tokens   S tokens of the text that is read   D width   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite import arch
from megalite.config import ModelConfig
from megalite.model.attend import attention_mask
from megalite.model.cache import Cache, LayerCache
from megalite.model.heads import Classifier, Head, Transform, head_loss
from megalite.model.layers import (
    MLP,
    Attention,
    CrossAttention,
    distance_buckets,
    make_norm,
    rope_table,
    sinusoids,
)


class Embedding(nn.Module):
    """Rows of a table, chosen by index: [B, T] -> [B, T, D]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Block(nn.Module):
    """Attention, attention to another text where there is one, and the MLP; each a residual branch.

    x + f(norm(x)), pre-norm (Xiong et al. 2020), or norm(x + f(x)), post-norm (Vaswani et al.
    2017).
    """

    def __init__(self, config: ModelConfig, *, causal: bool, cross: bool) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, causal=causal)
        self.cross_attn = None
        if cross:
            self.cross_attn_layernorm = make_norm(config)
            self.cross_attn = CrossAttention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout, self.post = config.hidden_dropout, config.norm_position == "post"

    def forward(
        self,
        x_BTD: Tensor,
        rope: Tensor | None,
        mask: Tensor | None,
        memory_BSD: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x_BTD = self._add(x_BTD, self.input_layernorm, self.self_attn, rope, mask, cache)
        if self.cross_attn is not None:
            norm = self.cross_attn_layernorm
            x_BTD = self._add(x_BTD, norm, self.cross_attn, memory_BSD, memory_mask, cache)
        return self._add(x_BTD, self.post_attention_layernorm, self.mlp)

    def _add(
        self, x: Tensor, norm: nn.Module, branch: nn.Module, *inputs: Tensor | LayerCache | None
    ) -> Tensor:
        y = branch(x if self.post else norm(x), *inputs)
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        return norm(x + y) if self.post else x + y


class Stack(nn.Module):
    """Token ids to hidden states.

    Args:
        embeds: whether it has the table of token embeddings, which is handed to it otherwise.
    """

    def __init__(
        self, config: ModelConfig, layers: int, *, embeds: bool, causal: bool, cross: bool = False
    ) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        D, kind = config.hidden_size, config.position_embedding
        if embeds:
            self.embed_tokens = Embedding(config.vocab_size, D)
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
            Block(config, causal=causal, cross=cross) for _ in range(layers)
        )
        if config.norm_position == "pre":
            self.norm = make_norm(config)

    def forward(
        self,
        input_ids: Tensor,
        inputs: Mapping[str, Tensor],
        embed: nn.Module | None = None,
        memory_BSD: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """[B, T] -> [B, T, D].

        Args:
            inputs: position_ids, document_ids, attention_mask and token_type_ids where there are
                any; see `LanguageModel.forward`.
            cache: what was computed of the tokens before these; these are added.
        """
        T, past = input_ids.shape[1], cache.length if cache else 0
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + T, device=input_ids.device)
        x_BTD = self._embed(embed or self.embed_tokens, input_ids, positions, inputs)
        rope = None
        if self.config.position_embedding == "rope":
            rope = rope_table(positions, self.config)
        mask = attention_mask(
            T,
            past + T,
            causal=self.causal,
            window=self.config.sliding_window,
            document_ids=inputs.get("document_ids"),
            keys=inputs.get("attention_mask"),
            device=input_ids.device,
            explicit=self.config.position_embedding == "relative",
        )
        if self.config.position_embedding == "relative":
            mask = self._with_bias(mask, T, past + T).to(x_BTD.dtype)
        for index, block in enumerate(self.layers):
            kept = cache.layers[index] if cache else None
            x_BTD = block(x_BTD, rope, mask, memory_BSD, memory_mask, kept)
        if cache:
            cache.length += T
        return x_BTD if self.config.norm_position == "post" else self.norm(x_BTD)

    def _embed(
        self, embed: nn.Module, input_ids: Tensor, positions: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        config, kind = self.config, self.config.position_embedding
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
            x_BTD = x_BTD + sinusoids(positions, config.hidden_size).to(x_BTD.dtype)
        if config.embedding_norm:
            x_BTD = self.embed_norm(x_BTD)
        if config.hidden_dropout:
            x_BTD = F.dropout(x_BTD, config.hidden_dropout, self.training)
        return x_BTD

    def _with_bias(self, mask: Tensor | None, queries: int, keys: int) -> Tensor:
        """T5's bias of each head for the distance of two tokens, -inf where one may not look."""
        device = self.relative_attention_bias.weight.device
        buckets = distance_buckets(queries, keys, self.config, causal=self.causal, device=device)
        bias_1NTT = self.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        if mask is None:
            return bias_1NTT
        return bias_1NTT.masked_fill(~mask, -math.inf)


class EncoderDecoder(nn.Module):
    """Two stacks that share the token embeddings: one reads a text, the other writes one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        first, second = arch.stacks(config).values()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack(config, first, embeds=False, causal=False)
        self.decoder = Stack(config, second, embeds=False, causal=True, cross=True)

    def read(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The hidden states of the text that is read, [B, S, D], and which of them count."""
        memory_BSD = self.encoder(inputs["input_ids"], inputs, self.embed_tokens)
        keys = inputs.get("attention_mask")
        return memory_BSD, None if keys is None else keys[:, None, None, :]

    def write(
        self, ids_BT: Tensor, memory: tuple[Tensor, Tensor | None], cache: Cache | None = None
    ) -> Tensor:
        """The hidden states of the text that is written, [B, T, D]."""
        hidden: Tensor = self.decoder(ids_BT, {}, self.embed_tokens, *memory, cache)
        return hidden


class LanguageModel(nn.Module):
    """A model: `forward` gives the summed loss of a batch, `logits` the scores of its tokens."""

    model: Stack | EncoderDecoder

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if config.architecture == "encoder_decoder":
            self.model = EncoderDecoder(config)
        else:
            causal = config.architecture == "decoder"
            self.model = Stack(config, config.num_hidden_layers, embeds=True, causal=causal)
        self.head_loss: Callable[..., Tensor] = head_loss
        self.product: Callable[..., Tensor] | None = None  # instead of F.linear: see decoding
        self.whole_logits: Callable[[Tensor], Tensor] = lambda logits: logits
        self.all_tokens: Callable[[Tensor], Tensor] = lambda hidden: hidden
        encodes = config.architecture == "encoder"
        if config.num_labels:
            self.score = Classifier(config)
            return
        if encodes:
            self.lm_transform = Transform(config)
        if encodes or not config.tie_word_embeddings:
            self.lm_head = Head(config, bias=encodes)

    @property
    def blocks(self) -> Iterator[nn.Module]:
        """The blocks of all stacks."""
        for name in arch.stacks(self.config):
            yield from self.get_submodule(name).layers  # type: ignore[misc]

    def forward(self, batch: Mapping[str, Tensor], *, scores: bool = False) -> Tensor:
        """Sum of the cross entropy over the batch's unmasked targets: fp32 scalar, nats.

        Of a classifier over samples, whose labels and loss_mask are [B]; with `scores`
        `label_scores` instead, or `next_scores` of another model, so that an engine gathers the
        weights of what that runs.

        Args:
            batch: input_ids [B, T] and the labels [B, T] of the same places, those that count by
                loss_mask; where it is needed position_ids and document_ids [B, T],
                attention_mask (bool [B, T], tokens that are seen), token_type_ids; target_rows
                (int64 [R]), the rows of [B x T] that the head is computed for. With two stacks
                input_ids are those that are read, and decoder_input_ids go with the labels.
        """
        if scores:
            return self.label_scores(batch) if self.config.num_labels else self.next_scores(batch)
        labels, mask = batch["labels"], batch["loss_mask"]
        if self.config.num_labels:
            return self.score.loss(self.label_scores(batch), labels, mask)
        hidden_BTD = self._head_input(self.hidden(batch))
        loss = partial(self.head_loss, chosen_R=batch.get("target_rows"))
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden_BTD, labels, mask, loss)
        weight = self.model.embed_tokens.weight
        if self.config.architecture == "encoder":
            return self.lm_head(hidden_BTD, labels, mask, loss, weight)
        return loss(hidden_BTD, weight, labels, mask)

    def hidden(self, batch: Mapping[str, Tensor], cache: Cache | None = None) -> Tensor:
        """Hidden states of the tokens that have labels: [B, T, D]."""
        if isinstance(self.model, EncoderDecoder):
            return self.model.write(batch["decoder_input_ids"], self.model.read(batch), cache)
        hidden: Tensor = self.model(batch["input_ids"], batch, cache=cache)
        return hidden

    def label_scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """fp32 logits of the labels, [B, C].

        Args:
            batch: as `forward` takes it, and lengths, int64 [B]: tokens of each sample, which begin
                it.
        """
        scores: Tensor = self.score(self.all_tokens(self.hidden(batch)), batch["lengths"])
        return scores

    def next_scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """fp32 logits of the token after each text, [B, V]; by way of the head's own forward.

        Args:
            batch: as `forward` takes it, and lengths, int64 [B]: tokens of each text so far.
        """
        hidden_BTD, lengths_B = self.all_tokens(self.hidden(batch)), batch["lengths"]
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        last_BD = self._head_input(hidden_BTD[rows_B, lengths_B - 1])
        if self.config.tie_word_embeddings:
            logits_BV = F.linear(last_BD, self.model.embed_tokens.weight)
        else:
            logits_BV = self.lm_head(last_BD, None, None, lambda x, weight, *_: F.linear(x, weight))
        return self.whole_logits(logits_BV.float())

    def logits(self, inputs: Tensor | Mapping[str, Tensor], *, last_only: bool = False) -> Tensor:
        """fp32 scores, [B, T, V], or [B, V] of the last place alone.

        Args:
            inputs: input_ids [B, T], or a batch as `forward` takes it.
        """
        batch = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
        hidden_BTD = self.hidden(batch)
        return self.scores(hidden_BTD[:, -1] if last_only else hidden_BTD)

    def scores(self, hidden: Tensor) -> Tensor:
        """fp32 logits [..., V] of hidden states [..., D]."""
        bias = self.lm_head.bias if self.config.architecture == "encoder" else None
        product = self.product or F.linear
        return self.whole_logits(product(self._head_input(hidden), self.head_weight, bias).float())

    @property
    def head_weight(self) -> nn.Parameter:
        """What hidden states are multiplied with: [V, D]."""
        tied = self.config.tie_word_embeddings
        weight = self.model.embed_tokens.weight if tied else self.lm_head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _head_input(self, hidden: Tensor) -> Tensor:
        if self.config.architecture == "encoder":
            hidden = self.lm_transform(hidden)
        scale = self.config.logits_scaling
        return hidden if scale == 1 else hidden / scale


def build(config: ModelConfig) -> LanguageModel:
    """An uninitialised model whose parameters agree, one by one, with the table of shapes."""
    model = LanguageModel(config)
    built = [name for name, _ in model.named_parameters()]
    table = [parameter.name for parameter in arch.parameters(config)]
    assert built == table, f"model and table of shapes disagree: {set(built) ^ set(table)}"
    return model
