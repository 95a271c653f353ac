"""Self-attention, and cross-attention to the encoder's text.

The letters are those of `megalite.arch.part`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalite.arch.norms import in_forward_order, norm_rows
from megalite.arch.part import Cost, Flow, Grads, Pair, SavedBytes, Workload
from megalite.arch.products import (
    KERNELS,
    RESIDUAL_PASSES,
    ProductMessages,
    add,
    of_module,
    product_flops,
)
from megalite.arch.table import Init, ParameterSpec, Sees, Split, specify
from megalite.config import ModelConfig

# reads and writes of q and k by the rotation: in one compiled kernel (True), or eager (False)
_ROTATION_PASSES = {True: 3, False: 10}


@dataclass(frozen=True)
class SelfAttention:
    """Self-attention with grouped key/value heads, and the norm of its residual branch.

    Attributes:
        causal: whether a token sees only the tokens before it.
        window: number of tokens that a token attends to, itself included. None means all.
    """

    causal: bool
    window: int | None

    def rows(self, model: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
        """Yield the parameters; q, k and v are fused into one matrix."""
        key = _key_width(model)
        fused = {"q_proj": _query_width(model), "k_proj": key, "v_proj": key}
        yield from norm_rows(model, f"{prefix}input_layernorm")
        yield from _projection(model, f"{prefix}self_attn.qkv_proj", fused)
        if model.qk_norm:
            for norm in ("q_norm", "k_norm"):
                gain = f"{prefix}self_attn.{norm}.weight"
                yield specify(gain, (model.head_dim,), init=Init.ONES, sees=Sees.OWN_HEADS)
        yield from _output(model, f"{prefix}self_attn.o_proj")

    def follow(self, model: ModelConfig, specs: Sequence[ParameterSpec], flow: Flow) -> None:
        """Update `flow`; the gradients of relative position biases join at the scores."""
        ordered = in_forward_order(model, specs, "input_layernorm")
        before, after = _split_at(ordered, "o_proj")
        flow.hidden = flow.through(before, flow.hidden) or flow.bias
        flow.hidden = flow.through(after, flow.hidden)

    def cost(
        self, model: ModelConfig, specs: Sequence[ParameterSpec], load: Workload, grads: Grads
    ) -> Cost:
        """Return the cost of one block's self-attention."""
        pairs = seen_pairs(
            load.tokens, load.document_tokens, causal=self.causal, window=self.window
        )
        messages = ProductMessages(specs, model.hidden_size, load, grads)
        query, key = _query_width(model) // load.tensor, _key_width(model) // load.tensor
        stream = load.stream_width(model)
        element = load.element
        rotated = query + key if model.position_embedding == "rope" else 0
        mask, scores = self._score_bytes(model, load)
        moved = RESIDUAL_PASSES[load.compiled] * stream
        moved += _ROTATION_PASSES[load.compiled] * (query + key)
        moved += model.hidden_size + 2 * query + 2 * key  # inputs and outputs of the products
        return Cost(
            products=product_flops(specs, load.tokens, grads),
            attention=_attention_flops(model, pairs, "self_attn.o_proj.weight" in grads.inputs),
            messages=(
                *messages.column("self_attn.qkv_proj", load.batch_tokens),
                *messages.row("self_attn.o_proj", load.batch_tokens, again=load.recompute),
            ),
            saved=SavedBytes(
                norm=stream * load.norm_bytes,
                # qkv, the rotated q and k, and the result; its log-sum-exp in fp32; dropout
                values=element * (rotated + 2 * query + 2 * key)
                + 4 * query // model.head_dim
                + stream * load.dropout_bytes(model),
                outputs=element * (stream + 2 * query + 2 * key),
                mask=mask,
                scores=scores,
            ),
            moved=element * load.batch_tokens * moved,
            kernels=KERNELS[load.compiled],
        )

    def _score_bytes(self, model: ModelConfig, load: Workload) -> tuple[int, int]:
        """Return the bytes of a fused kernel's mask, and of the scores without a fused kernel.

        One of the two is 0. The fused kernel converts a bool mask to numbers and saves it. CUDA's
        fused kernels that take a mask do not support grouped heads, so `megalite.model.attention`
        repeats the key/value heads.
        """
        heads = model.num_attention_heads // load.tensor
        pairs = load.tokens**2
        if scores_one_by_one(model, load):
            copies = 3 if model.attention_dropout > 0 else 1  # scores, dropout's mask, product
            return 0, 4 * copies * load.samples * heads * pairs
        masks = mask_count(load, self.window)
        if model.position_embedding == "relative" or not masks:
            return 0, 0
        more = heads - model.num_key_value_heads // load.tensor
        repeated = 0 if load.cpu else 2 * more * model.head_dim * load.batch_tokens
        return load.element * (masks * pairs + repeated), 0


@dataclass(frozen=True)
class CrossAttention:
    """Attention to the encoder's hidden states, and the norm of its residual branch."""

    def rows(self, model: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
        """Yield the parameters; k and v are fused. q is separate, because its input differs."""
        key = _key_width(model)
        yield from norm_rows(model, f"{prefix}cross_attn_layernorm")
        yield from _projection(model, f"{prefix}cross_attn.q_proj", {"q_proj": _query_width(model)})
        yield from _projection(model, f"{prefix}cross_attn.kv_proj", {"k_proj": key, "v_proj": key})
        yield from _output(model, f"{prefix}cross_attn.o_proj")

    def follow(self, model: ModelConfig, specs: Sequence[ParameterSpec], flow: Flow) -> None:
        """Update `flow`; the gradients of the encoder's text join at k and v."""
        ordered = in_forward_order(model, specs, "cross_attn_layernorm")
        reading = [spec for spec in ordered if ".kv_proj." in spec.name]
        before, after = _split_at([spec for spec in ordered if spec not in reading], "o_proj")
        memory = flow.through(reading, flow.memory)
        flow.hidden = flow.through(before, flow.hidden) or memory
        flow.hidden = flow.through(after, flow.hidden)

    def cost(
        self, model: ModelConfig, specs: Sequence[ParameterSpec], load: Workload, grads: Grads
    ) -> Cost:
        """Return the cost of one block's cross-attention."""
        messages = ProductMessages(specs, model.hidden_size, load, grads)
        query, key = _query_width(model) // load.tensor, _key_width(model) // load.tensor
        stream = load.stream_width(model)
        element = load.element
        reading = of_module(specs, "cross_attn.kv_proj")
        writing = [spec for spec in specs if spec not in reading]
        moved = RESIDUAL_PASSES[load.compiled] * stream + model.hidden_size + 2 * query
        read = model.hidden_size + 2 * key
        drops = model.attention_dropout > 0 and load.cpu
        heads = model.num_attention_heads // load.tensor
        pairs = load.tokens * load.memory_tokens
        return Cost(
            products=add(
                product_flops(writing, load.tokens, grads),
                product_flops(reading, load.memory_tokens, grads),
            ),
            attention=_attention_flops(model, pairs, "cross_attn.o_proj.weight" in grads.inputs),
            messages=(
                *messages.column("cross_attn.q_proj", load.batch_tokens),
                *messages.column("cross_attn.kv_proj", load.batch_memory_tokens),
                *messages.row("cross_attn.o_proj", load.batch_tokens, again=load.recompute),
            ),
            saved=SavedBytes(
                norm=stream * load.norm_bytes,
                values=element * 2 * query
                + 4 * query // model.head_dim
                + stream * load.dropout_bytes(model),
                outputs=element * (stream + 2 * query),
                memory=2 * element * key * load.batch_memory_tokens,
                scores=4 * 3 * load.samples * heads * pairs * drops,
            ),
            moved=element * (load.batch_tokens * moved + load.batch_memory_tokens * read),
            kernels=KERNELS[load.compiled],
        )


def seen_pairs(
    tokens: int, document_tokens: float | None = None, *, causal: bool, window: int | None
) -> float:
    """Return how many tokens each token of a sample sees, summed over the sample.

    All documents are taken to have the mean length. If lengths differ, the result is a lower bound.
    """
    length = min(tokens, document_tokens or tokens)
    near = min(length, window or length)
    pairs = near * (near + 1) / 2 + (length - near) * near
    if not causal:
        pairs = length * length if near == length else 2 * pairs - length
    return tokens / length * pairs if length else 0.0


def mask_count(load: Workload, window: int | None) -> int:
    """Return how many [T, T] masks the self-attention of a micro-batch has.

    For documents and padding, `megalite.model.attention` builds one mask per sample. For a sliding
    window alone, all samples share one mask.
    """
    if load.sample_masks:
        return load.samples
    return int(window is not None and window < load.tokens)


def scores_one_by_one(model: ModelConfig, load: Workload) -> bool:
    """Return whether attention stores all scores, because no fused kernel applies.

    PyTorch's fused attention on CPUs supports neither dropout nor trained biases.
    """
    return load.cpu and (model.attention_dropout > 0 or model.position_embedding == "relative")


def _query_width(model: ModelConfig) -> int:
    return model.num_attention_heads * model.head_dim


def _key_width(model: ModelConfig) -> int:
    return model.num_key_value_heads * model.head_dim


def _projection(model: ModelConfig, name: str, parts: dict[str, int]) -> Iterator[ParameterSpec]:
    """Yield the weight of a projection that is split by heads, and its bias, if any."""
    weights = {part: (rows, model.hidden_size) for part, rows in parts.items()}
    yield specify(f"{name}.weight", weights, Split.HEADS)
    if model.attention_bias:
        biases = {part: (rows,) for part, rows in parts.items()}
        yield specify(f"{name}.bias", biases, Split.HEADS)


def _output(model: ModelConfig, name: str) -> Iterator[ParameterSpec]:
    """Yield the parameters of the branch's output projection."""
    shape = (model.hidden_size, _query_width(model))
    yield specify(f"{name}.weight", shape, Split.INPUT_DIM, Init.SCALED_NORMAL)
    if model.attention_output_bias:
        yield specify(f"{name}.bias", shape[:1], sees=Sees.OWN_TOKENS)


def _split_at(
    specs: list[ParameterSpec], module: str
) -> tuple[list[ParameterSpec], list[ParameterSpec]]:
    """Return the parameters before the first one of `module`, and the rest."""
    at = next(i for i, spec in enumerate(specs) if f".{module}." in spec.name)
    return specs[:at], specs[at:]


def _attention_flops(model: ModelConfig, pairs: float, has_backward: bool) -> Pair:
    """Return a sample's FLOPs of q k^T and of the product of the scores with v.

    Together they cost 4 Q per pair of tokens, and twice that in the backward (PaLM, arXiv
    2204.02311, appendix B).
    """
    forward = 4.0 * _query_width(model) * pairs
    return forward, 2 * forward * has_backward
