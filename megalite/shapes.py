"""How every parameter of a model is named, shaped, split and started: THE table.

Two views of one weight. On disk it is a *canonical tensor*: Hugging Face's (Llama's) name, not
fused, [out, in], vocabulary not padded. In memory it is part of a *parameter*: q, k and v are
stacked along dim 0 into one matrix, gate and up into another, and each rank of a tensor-parallel
group holds a slice. `pieces` maps one to the other; layers, initialisation, checkpoints, export
and the planner all read it here.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megalite.config import ModelConfig


class Split(enum.Enum):
    """How tensor-parallel ranks share a canonical [out, in] (or [out]) tensor."""

    REPLICATED = "each rank holds all of it"
    ROWS = "dim 0, in equal parts"
    COLUMNS = "dim 1, in equal parts"
    VOCABULARY = "dim 0, padded to equal parts"
    HEADS = "dim 0, in equal parts of whole heads"


class Init(enum.Enum):
    """What an element starts as; the standard deviation is `initializer_range`."""

    NORMAL = "normal"
    SCALED_NORMAL = "normal, over sqrt(2 x layers): what ends a residual branch"
    ONES = "ones"
    ZEROS = "zeros"


_WHOLE, _ROWS, _COLUMNS = Split.REPLICATED, Split.ROWS, Split.COLUMNS
_VOCAB, _HEADS = Split.VOCABULARY, Split.HEADS
_NORMAL, _SCALED, _ONES, _ZEROS = Init.NORMAL, Init.SCALED_NORMAL, Init.ONES, Init.ZEROS

# One row a parameter, in the order of the model's named_parameters(); rows of `model.layers.N.`
# repeat for each layer. V vocabulary, P positions, D width, F width inside the MLP, Q query
# heads x head width, K key/value heads x head width. A shape alone is a tensor of the same
# name; `q_proj QD + k_proj KD` are tensors of those names, stacked along dim 0. The last column
# says when the model has the parameter. Weights are decayed, vectors (norms, biases) are not.
# fmt: off
TABLE: tuple[tuple[str, str, Split, Init, str], ...] = (
    ("model.embed_tokens.weight",                      "VD", _VOCAB,   _NORMAL, "always"),
    ("model.embed_positions.weight",                   "PD", _WHOLE,   _NORMAL, "learned"),
    ("model.layers.N.input_layernorm.weight",          "D",  _WHOLE,   _ONES,   "always"),
    ("model.layers.N.input_layernorm.bias",            "D",  _WHOLE,   _ZEROS,  "layernorm"),
    ("model.layers.N.self_attn.qkv_proj.weight",
     "q_proj QD + k_proj KD + v_proj KD",                    _HEADS,   _NORMAL, "always"),
    ("model.layers.N.self_attn.qkv_proj.bias",
     "q_proj Q + k_proj K + v_proj K",                       _HEADS,   _ZEROS,  "attention_bias"),
    ("model.layers.N.self_attn.o_proj.weight",         "DQ", _COLUMNS, _SCALED, "always"),
    ("model.layers.N.self_attn.o_proj.bias",           "D",  _WHOLE,   _ZEROS,  "attention_bias"),
    ("model.layers.N.post_attention_layernorm.weight", "D",  _WHOLE,   _ONES,   "always"),
    ("model.layers.N.post_attention_layernorm.bias",   "D",  _WHOLE,   _ZEROS,  "layernorm"),
    ("model.layers.N.mlp.gate_up_proj.weight",
     "gate_proj FD + up_proj FD",                            _ROWS,    _NORMAL, "gated"),
    ("model.layers.N.mlp.gate_up_proj.bias",
     "gate_proj F + up_proj F",                              _ROWS,    _ZEROS,  "gated mlp_bias"),
    ("model.layers.N.mlp.up_proj.weight",              "FD", _ROWS,    _NORMAL, "plain"),
    ("model.layers.N.mlp.up_proj.bias",                "F",  _ROWS,    _ZEROS,  "plain mlp_bias"),
    ("model.layers.N.mlp.down_proj.weight",            "DF", _COLUMNS, _SCALED, "always"),
    ("model.layers.N.mlp.down_proj.bias",              "D",  _WHOLE,   _ZEROS,  "mlp_bias"),
    ("model.norm.weight",                              "D",  _WHOLE,   _ONES,   "always"),
    ("model.norm.bias",                                "D",  _WHOLE,   _ZEROS,  "layernorm"),
    ("lm_head.weight",                                 "VD", _VOCAB,   _NORMAL, "untied"),
)
# fmt: on


@dataclass(frozen=True)
class Tensor:
    """A canonical tensor: what a checkpoint and a Hugging Face folder hold."""

    name: str
    shape: tuple[int, ...]
    split: Split

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model in memory; several tensors are stacked along dim 0."""

    name: str
    tensors: tuple[Tensor, ...]
    init: Init
    decay: bool

    @property
    def elements(self) -> int:
        """Of the whole parameter, unpadded, over all tensor ranks."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def is_matrix_of_block(self) -> bool:
        """Whether it is a weight of a block's matrix products."""
        return self.decay and ".layers." in self.name


@dataclass(frozen=True)
class Piece:
    """The box `source` of a canonical tensor lies at the box `target` of a local parameter."""

    tensor: Tensor
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """The parameters of a model, in the order of its `named_parameters()`."""
    has = _conditions(model)
    rows = [row for row in TABLE if all(has[word] for word in row[4].split())]
    first = next(i for i, row in enumerate(rows) if ".N." in row[0])
    last = max(i for i, row in enumerate(rows) if ".N." in row[0])
    sizes = _sizes(model)
    return (
        *(_parameter(row, sizes) for row in rows[:first]),
        *(
            _parameter(row, sizes, layer)
            for layer in range(model.num_hidden_layers)
            for row in rows[first : last + 1]
        ),
        *(_parameter(row, sizes) for row in rows[last + 1 :]),
    )


def tensors(model: ModelConfig) -> dict[str, Tensor]:
    """The canonical tensors of a model by name, in the order of its parameters."""
    return {t.name: t for parameter in parameters(model) for t in parameter.tensors}


def local_shape(parameter: Parameter, *, tensor_parallel: int = 1) -> tuple[int, ...]:
    """The shape of a parameter on one rank of `tensor_parallel`, padding included."""
    locals_ = [_local(tensor, tensor_parallel) for tensor in parameter.tensors]
    return (sum(shape[0] for shape in locals_), *locals_[0][1:])


def pieces(
    parameter: Parameter, *, tensor_parallel: int = 1, tensor_rank: int = 0
) -> tuple[Piece, ...]:
    """Which boxes of which canonical tensors one rank's parameter is made of.

    What of the parameter no piece covers is padding of the vocabulary, which is zero.
    """
    return tuple(_pieces(parameter, tensor_parallel, tensor_rank))


def allowed_tensor_parallel(model: ModelConfig) -> list[int]:
    """The tensor-parallel sizes a model can be split by: they divide key/value heads and MLP."""
    common = math.gcd(model.num_attention_heads, model.num_key_value_heads, model.intermediate_size)
    return [size for size in range(1, common + 1) if common % size == 0]


def _conditions(model: ModelConfig) -> dict[str, bool]:
    gated = model.activation in ("swiglu", "geglu")
    return {
        "always": True,
        "learned": model.position_embedding == "learned",
        "layernorm": model.norm == "layernorm",
        "attention_bias": model.attention_bias,
        "mlp_bias": model.mlp_bias,
        "gated": gated,
        "plain": not gated,
        "untied": not model.tie_word_embeddings,
    }


def _sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "V": model.vocab_size,
        "P": model.max_position_embeddings,
        "D": model.hidden_size,
        "F": model.intermediate_size,
        "Q": model.num_attention_heads * model.head_dim,
        "K": model.num_key_value_heads * model.head_dim,
    }


def _parameter(
    row: tuple[str, str, Split, Init, str], sizes: dict[str, int], layer: int | None = None
) -> Parameter:
    pattern, stack, split, init, _ = row
    name = pattern if layer is None else pattern.replace(".N.", f".{layer}.")
    *owner, module, kind = name.split(".")
    parts = []
    for item in stack.split(" + "):
        own, _, symbols = item.rpartition(" ")
        shape = tuple(sizes[symbol] for symbol in symbols)
        parts.append(Tensor(".".join((*owner, own or module, kind)), shape, split))
    return Parameter(name, tuple(parts), init, decay=len(parts[0].shape) > 1)


def _local(tensor: Tensor, ranks: int) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if tensor.split is Split.VOCABULARY:
        shape[0] = -(-shape[0] // ranks)
    elif tensor.split is not Split.REPLICATED:
        dim = 1 if tensor.split is Split.COLUMNS else 0
        assert shape[dim] % ranks == 0, f"{tensor} over {ranks} ranks"
        shape[dim] //= ranks
    return tuple(shape)


def _pieces(parameter: Parameter, ranks: int, rank: int) -> Iterator[Piece]:
    assert 0 <= rank < ranks
    offset = 0
    for tensor in parameter.tensors:
        local = _local(tensor, ranks)
        dim = 1 if tensor.split is Split.COLUMNS else 0
        start = 0 if tensor.split is Split.REPLICATED else rank * local[dim]
        held = min(local[dim], tensor.shape[dim] - start)
        if held > 0:
            source = [slice(0, size) for size in tensor.shape]
            source[dim] = slice(start, start + held)
            target = [slice(0, box.stop - box.start) for box in source]
            target[0] = slice(offset + target[0].start, offset + target[0].stop)
            yield Piece(tensor, tuple(source), tuple(target))
        offset += local[0]
