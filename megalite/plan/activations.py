"""Bytes that the blocks of a model keep for the backward on one rank.

The letters are those of `megalite.plan.memory`. What a forward on a CPU keeps is checked against
`activation_bytes` by the tests, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megalite import arch, registry
from megalite.config import RunConfig
from megalite.plan.devices import Kind
from megalite.plan.gradients import gradients
from megalite.plan.sizes import Plan

MAPPED = 32 << 20  # a piece of so many bytes is not of a CPU's heap


@dataclass(frozen=True)
class _Stack:
    """The blocks of one stack in a micro-batch.

    Attributes:
        name, layers: as in `arch.stacks`. samples: B. length, read: tokens of a sample, and of
            the text that its blocks attend to besides.
    """

    name: str
    layers: int
    samples: int
    length: int
    read: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length


def _stacks(config: RunConfig, plan: Plan) -> Iterator[_Stack]:
    lengths = arch.lengths(config)
    for name, layers in arch.stacks(config.model).items():
        read = lengths["model.encoder"] if name == "model.decoder" else 0
        yield _Stack(name, layers, plan.micro_batch_size, lengths[name], read)


def activation_bytes(config: RunConfig, plan: Plan, element: int, device: Kind) -> tuple[int, int]:
    """Bytes kept for the backward, and those of work in the one block being differentiated."""
    model, kept, work = config.model, 0, 0
    # the embedding, and of a pre-norm model the last norm; ids, labels, positions
    ends = element * (3 if model.norm_position == "pre" else 1) * model.hidden_size + 3 * 8
    ends += _noise(config, element, device) * model.hidden_size
    for stack in _stacks(config, plan):
        of_block, of_work = _block(config, plan, element, device, stack)
        kept += (
            stack.layers * of_block
            + stack.tokens * ends
            + _shared_mask(config, plan, element, stack)
        )
        work = max(work, of_work)
    return kept, work


def _block(
    config: RunConfig, plan: Plan, element: int, device: Kind, stack: _Stack
) -> tuple[int, int]:
    """Return `activation_bytes` of one block."""
    model, t, tokens = config.model, plan.tensor_parallel, stack.tokens
    d, f = model.hidden_size, model.intermediate_size // t
    q = model.num_attention_heads * model.head_dim // t
    k = model.num_key_value_heads * model.head_dim // t
    gated, cross = model.gated, stack.read > 0
    own = d // t if config.parallel.sequence else d  # of what is split along the tokens
    # Per token: the norms; qkv, the turned q and k, and what attention gives (3 Q + 3 K); the MLP's
    # first products, its activation and product. Of attention to what is read its norm, q and
    # result, and per token that is read k and v.
    turned = q + k if model.position_embedding == "rope" else 0
    block = round((2 + cross) * own * _norm(config, element, device))
    block += element * (turned + 2 * q + 2 * k + 2 * q * cross + (4 if gated else 2) * f)
    block += 4 * q // model.head_dim * (1 + cross)  # log-sum-exp of attention
    block += (2 + cross) * own * _noise(config, element, device)
    # the block's input, qkv, attention, its projection, the MLP's products
    products = element * (3 * own + 2 * q + 2 * k + (2 if gated else 1) * f)
    products += element * (own + 2 * q) * cross
    scores = _scores(config, plan, element, device, stack)
    whole = tokens * block + scores
    keys = 2 * element * k * stack.samples * stack.read
    whole += keys
    kept = {
        "none": whole,
        "selective": tokens * products + keys,
        "full": tokens * element * own,
    }[config.training.activation_checkpointing]
    work = tokens * element * (2 * d + (3 if gated else 2) * f)  # gradients within the block
    if _plain_attention(config, device):  # of scores, their softmax, and the dropped
        work += scores
    again = config.training.activation_checkpointing != "none"
    return kept, work + whole * again


def _eager_cpu(config: RunConfig, device: Kind) -> bool:
    return device == "cpu" and not config.training.compile


def _norm(config: RunConfig, element: int, device: Kind) -> float:
    """Return bytes an element of the width that one norm keeps: its input and its output.

    A CPU has no kernel of its own for an RMS norm: it keeps the input in fp32 and, where the gain
    learns, the normalized input as well.
    """
    model = config.model
    if not registry.norms.facts(model.norm).get("composite") or not _eager_cpu(config, device):
        return 2 * element
    learned = gradients(model, config.finetune).learned
    norms = [row.name for row in arch.parameters(model) if "layernorm.weight" in row.name]
    return element + 4 + 4 * sum(name in learned for name in norms) / len(norms)


def _noise(config: RunConfig, element: int, device: Kind) -> int:
    """Return bytes an element of one dropout's mask, which a CPU keeps as a factor."""
    each = element if _eager_cpu(config, device) else 1
    return each if config.model.hidden_dropout > 0 else 0


def _mask_samples(config: RunConfig, stack: _Stack) -> int:
    """Return how many [T, T] masks a stack's self-attention has in a micro-batch; 0: none.

    As `megalite.model.attention` makes them: for documents and padding one of each sample, for a
    window alone one for all.
    """
    tuning, window = config.finetune, config.model.sliding_window
    reads = stack.name != "model.decoder"  # what is written has neither padding nor documents
    documents = tuning.data.packing if tuning else config.data.mask_documents
    padded = tuning is not None and config.model.architecture != "decoder"
    if reads and (documents or padded):
        return stack.samples
    return int(window is not None and window < stack.length)


def _shared_mask(config: RunConfig, plan: Plan, element: int, stack: _Stack) -> int:
    """Return bytes of what all blocks of a stack share: a bool mask, T5's biases and gradients."""
    samples = _mask_samples(config, stack)
    if config.model.position_embedding == "relative":
        heads = config.model.num_attention_heads // plan.tensor_parallel
        return 2 * element * max(1, samples) * heads * stack.length**2
    return samples * stack.length**2


def _plain_attention(config: RunConfig, device: Kind) -> bool:
    """Return whether attention makes its scores one by one, for want of a fused kernel."""
    model = config.model
    return device == "cpu" and (
        model.attention_dropout > 0 or model.position_embedding == "relative"
    )


def _scores(config: RunConfig, plan: Plan, element: int, device: Kind, stack: _Stack) -> int:
    """Return bytes of tokens against tokens that the attention of one block keeps.

    Fused attention makes a mask of numbers from a bool mask and keeps it. On a CPU it knows neither
    dropout nor biases that learn: there the scores exist in fp32, and with dropout the mask and
    the product as well. A GPU's fused attention takes no mask for shared heads: they are repeated.
    """
    model, t = config.model, plan.tensor_parallel
    heads, pairs = model.num_attention_heads // t, stack.length**2
    crossed = stack.length * stack.read
    if _plain_attention(config, device):
        copies = 3 if model.attention_dropout > 0 else 1
        across = crossed if model.attention_dropout > 0 else 0
        return 4 * copies * stack.samples * heads * (pairs + across)
    samples = _mask_samples(config, stack)
    if model.position_embedding == "relative" or not samples:
        return 0
    repeated = 2 * (heads - model.num_key_value_heads // t) * model.head_dim * stack.tokens
    return element * (samples * pairs + repeated * (device == "cuda"))


def heap_bytes(config: RunConfig, plan: Plan, element: int) -> tuple[int, int]:
    """Return the bytes of activations on a CPU in pieces of the heap, and in larger ones.

    Masks count as larger pieces, because they leave no holes. Scores that are made one by one leave
    two more pieces of their size in the heap: the bare product, and its gradient.
    """
    kept, work = activation_bytes(config, plan, element, "cpu")
    model, small, large = config.model, kept + work, 0
    if config.training.activation_checkpointing != "none":
        return small, 0
    inner, parts = element * model.intermediate_size // plan.tensor_parallel, 1 + model.gated
    for stack in _stacks(config, plan):
        first, rest = parts * inner * stack.tokens, inner * stack.tokens
        mapped = first * (first >= MAPPED) + parts * rest * (rest >= MAPPED)
        scores = _scores(config, plan, element, "cpu", stack)
        if _plain_attention(config, "cpu"):
            small += stack.layers * scores * 2 // 3
        else:
            mapped += scores
        large += stack.layers * mapped
    return small - large, large
