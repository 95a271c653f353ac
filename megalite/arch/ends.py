"""The parts around the blocks: embeddings, final norms, and heads.

The letters are those of `megalite.arch.part`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megalite.arch.attention import mask_count
from megalite.arch.norms import norm_rows
from megalite.arch.part import Cost, Flow, Grads, Logits, Message, SavedBytes, Workload, chunk_sizes
from megalite.arch.table import ParameterSpec, Sees, Split, specify
from megalite.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LABEL_HEAD = "score.weight"
FIRST_BLOCK = "layers"  # stands for the hidden states before the first block in `Grads.inputs`

_CHUNK_ELEMENTS = 1 << 25  # logits of a chunk
_INDEX_BYTES = 3 * 8  # int64 ids, labels and positions of a token


@dataclass(frozen=True)
class TokenEmbedding:
    """The token embeddings, which all stacks share. The cost of look-ups is part of `Entry`."""

    def rows(self, model: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
        """Yield the weight."""
        shape = (model.vocab_size, model.hidden_size)
        yield specify(f"{prefix}embed_tokens.weight", shape, Split.VOCABULARY)

    def follow(self, model: ModelConfig, specs: Sequence[ParameterSpec], flow: Flow) -> None:
        """Do nothing: `Entry` covers the look-ups."""

    def cost(
        self, model: ModelConfig, specs: Sequence[ParameterSpec], load: Workload, grads: Grads
    ) -> Cost:
        """Return no cost."""
        return Cost()


@dataclass(frozen=True)
class Entry:
    """The input of a stack: embeddings of tokens, positions and segments.

    It also covers the tensors that all blocks share: attention masks and T5's relative position
    biases.

    Attributes:
        windows: the different attention windows of the stack's blocks. None means all tokens.
    """

    windows: tuple[int | None, ...]

    def rows(self, model: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
        """Yield the parameters of the stack's input, without the token embeddings."""
        width = model.hidden_size
        if model.position_embedding == "learned":
            shape = (model.max_position_embeddings, width)
            yield specify(f"{prefix}embed_positions.weight", shape)
        if model.type_vocab_size > 0:
            yield specify(f"{prefix}embed_types.weight", (model.type_vocab_size, width))
        if model.embedding_norm:
            yield from norm_rows(model, f"{prefix}embed_norm", sees=Sees.EVERYTHING)
        if model.position_embedding == "relative":
            shape = (model.relative_attention_num_buckets, model.num_attention_heads)
            yield specify(f"{prefix}relative_attention_bias.weight", shape, Split.INPUT_DIM)

    def follow(self, model: ModelConfig, specs: Sequence[ParameterSpec], flow: Flow) -> None:
        """Start `flow.hidden` from the embeddings, and `flow.bias` from the position biases."""
        biases = [spec for spec in specs if "relative_attention_bias." in spec.name]
        embeddings = [spec for spec in specs if spec not in biases]
        flow.bias = flow.trains(biases)
        flow.hidden = flow.through(embeddings, EMBEDDING in flow.trained)

    def cost(
        self, model: ModelConfig, specs: Sequence[ParameterSpec], load: Workload, grads: Grads
    ) -> Cost:
        """Return the cost of the embeddings and of the tensors that all blocks share."""
        whole = load.batch_tokens * model.hidden_size
        messages = [Message("all_reduce", whole)]  # each rank looks up its own rows
        if load.sequence and FIRST_BLOCK in grads.inputs:
            messages.append(Message("all_gather", whole))  # the backward of scatter_seq
        heads = model.num_attention_heads // load.tensor
        shared = 0
        for masks in (mask_count(load, window) for window in self.windows):
            if model.position_embedding == "relative":  # biases and their gradients
                shared += 2 * load.element * max(1, masks) * heads * load.tokens**2
            else:
                shared += masks * load.tokens**2  # bools
        each = load.element + load.dropout_bytes(model)
        saved = SavedBytes(values=each * model.hidden_size + _INDEX_BYTES, mask=shared)
        return Cost(messages=tuple(messages), saved=saved)


@dataclass(frozen=True)
class FinalNorm:
    """The norm that ends a pre-norm stack."""

    def rows(self, model: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
        """Yield the norm's parameters; a post-norm stack has none."""
        if model.norm_position == "pre":
            yield from norm_rows(model, f"{prefix}norm")

    def follow(self, model: ModelConfig, specs: Sequence[ParameterSpec], flow: Flow) -> None:
        """Update `flow` by the norm."""
        flow.hidden = flow.through(specs, flow.hidden)

    def cost(
        self, model: ModelConfig, specs: Sequence[ParameterSpec], load: Workload, grads: Grads
    ) -> Cost:
        """Return the cost of the norm, whose input and output are saved."""
        if model.norm_position != "pre":
            return Cost()
        return Cost(saved=SavedBytes(values=2 * load.element * model.hidden_size))


@dataclass(frozen=True)
class LanguageHead:
    """The logits of the vocabulary, fused with their cross entropy.

    An encoder's head transforms the hidden states first, as in BERT.
    """

    def rows(self, model: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
        """Yield an encoder's transform, the weight unless it is tied, and an encoder's bias."""
        width = model.hidden_size
        encodes = model.architecture == "encoder"
        if encodes:
            dense = f"{prefix}lm_transform.dense"
            sees = Sees.OWN_TOKENS
            yield specify(f"{dense}.weight", (width, width), sees=sees)
            yield specify(f"{dense}.bias", (width,), sees=sees)
            yield from norm_rows(model, f"{prefix}lm_transform.norm")
        if not model.tie_word_embeddings:
            yield specify(f"{prefix}{HEAD}", (model.vocab_size, width), Split.VOCABULARY)
        if encodes:
            yield specify(f"{prefix}lm_head.bias", (model.vocab_size,), Split.VOCABULARY)

    def weight(self, model: ModelConfig) -> str:
        """Return the name of the weight that hidden states are multiplied with."""
        return EMBEDDING if model.tie_word_embeddings else HEAD

    def follow(self, model: ModelConfig, specs: Sequence[ParameterSpec], flow: Flow) -> None:
        """Update `flow` by the transform and the head's weight."""
        transform = [spec for spec in specs if "lm_transform." in spec.name]
        if flow.hidden or flow.trains(transform):
            flow.inputs.add(self.weight(model))

    def cost(
        self, model: ModelConfig, specs: Sequence[ParameterSpec], load: Workload, grads: Grads
    ) -> Cost:
        """Return the cost of the logits and their loss, for the tokens that are predicted."""
        weight = self.weight(model)
        tokens, width = load.batch_tokens, model.hidden_size
        product = 2.0 * model.vocab_size * width * load.target_fraction * load.tokens
        local = -(-model.vocab_size // load.tensor)
        targets = padded_targets(tokens, math.ceil(tokens * load.target_fraction))
        chunk = chunk_rows(local)
        # logits become their gradient in place; without compilation, 16-bit logits are copied to
        # fp32 first
        each = load.element if load.element == 4 or load.compiled else load.element + 4
        gradients = 4 * local * (weight in grads.trained) + load.element * targets
        # six passes over fp32 logits: two for the loss, four for the gradient
        places = load.target_fraction * load.samples * load.tokens
        passes = 6 * 4 * places * model.vocab_size / load.tensor
        return Cost(
            products=(product, product * grads.products(weight)),
            messages=tuple(self._messages(model, load, grads, targets, chunk)),
            logits=Logits(each * min(chunk, targets) * local, gradients * width, passes),
        )

    def _messages(
        self, model: ModelConfig, load: Workload, grads: Grads, targets: int, chunk: int
    ) -> Iterator[Message]:
        """Yield the messages of the head's input, and of its cross entropy in chunks."""
        whole = load.batch_tokens * model.hidden_size
        if load.sequence:
            yield Message("all_gather", whole)
        if self.weight(model) in grads.inputs:
            yield Message("reduce_scatter" if load.sequence else "all_reduce", whole)
        for size, count in chunk_sizes(targets, chunk):
            # the rows' maxima, then their sums of exponentials and the targets' logits
            yield Message("all_reduce", size, count, fp32=True)
            yield Message("all_reduce", 2 * size, count, fp32=True)
        if load.label_smoothing:
            yield Message("all_reduce", model.hidden_size, fp32=True)  # weight of the mean logit


@dataclass(frozen=True)
class LabelHead:
    """The logits of a classifier's labels, from one hidden state per sample."""

    def rows(self, model: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
        """Yield the weight."""
        shape = (model.num_labels, model.hidden_size)
        yield replace(specify(f"{prefix}{LABEL_HEAD}", shape), is_label_head=True)

    def follow(self, model: ModelConfig, specs: Sequence[ParameterSpec], flow: Flow) -> None:
        """Update `flow` by the head's weight."""
        if flow.hidden:
            flow.inputs.add(LABEL_HEAD)

    def cost(
        self, model: ModelConfig, specs: Sequence[ParameterSpec], load: Workload, grads: Grads
    ) -> Cost:
        """Return the cost of the logits and their loss, for one row per sample."""
        product = 2.0 * model.num_labels * model.hidden_size
        messages: tuple[Message, ...] = ()
        if load.sequence:
            messages = (Message("all_gather", load.batch_tokens * model.hidden_size),)
        # logits in the run's precision, logits in fp32, and their gradient
        scores = (load.element + 8) * load.samples * model.num_labels
        products = (product, product * grads.products(LABEL_HEAD))
        return Cost(products=products, messages=messages, logits=Logits(scores))


def chunk_rows(vocabulary: int) -> int:
    """Return for how many tokens the fused head and loss hold fp32 logits at the same time.

    These logits fill 128 MiB. The number is a multiple of 64, which suits the matrix product.
    """
    return max(64, _CHUNK_ELEMENTS // vocabulary // 64 * 64)


def padded_targets(rows: int, targets: int) -> int:
    """Return for how many rows of a micro-batch the head and its loss are computed.

    The number of targets is rounded up, so that few sizes occur. If less than a quarter of the rows
    would be saved, the result is all rows.
    """
    rounded = max(64, -(-targets // 64) * 64)
    return rounded if 4 * rounded <= 3 * rows else rows
