"""How every parameter of a model is named, shaped, split and started: THE table.

Two views of one weight. On disk it is a *canonical tensor*: Hugging Face's (Llama's) name, not
fused, [out, in], vocabulary not padded. In memory it is part of a *parameter*: q, k and v are
stacked along dim 0 into one matrix, gate and up into another, and each rank of a tensor-parallel
group holds a slice. `pieces` maps one to the other; layers, initialisation, checkpoints, export
and the planner all read it here.
"""

from __future__ import annotations

import enum
import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megalite.config import (
    AdapterConfig,
    FinetuneConfig,
    ModelConfig,
    RunConfig,
    source_length,
    target_length,
)
from megalite.mesh import WHOLE, Coordinate

_CHUNK_ELEMENTS = 1 << 25  # of logits


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
    ADAPTER = "normal, 1 / sqrt(3 x inputs): as many as a uniform Kaiming start has"
    SCALED_NORMAL = "normal, over sqrt(2 x layers): what ends a residual branch"
    ONES = "ones"
    ZEROS = "zeros"


_WHOLE, _ROWS, _COLUMNS = Split.REPLICATED, Split.ROWS, Split.COLUMNS
_VOCAB, _HEADS = Split.VOCABULARY, Split.HEADS
_NORMAL, _SCALED, _ONES, _ZEROS = Init.NORMAL, Init.SCALED_NORMAL, Init.ONES, Init.ZEROS

# One row a parameter, in the order of the model's named_parameters(). Rows of `S.` repeat for each
# stack (`model`, or `model.encoder` and `model.decoder`), those of `S.layers.N.` for each layer.
# V vocabulary, C labels, P positions, Y types, B buckets, D width, F width inside the MLP, N query
# heads, H head width, Q = N x H, K key/value heads x head width. A shape alone is a tensor of the
# same name; `q_proj QD + k_proj KD` are tensors of those names, stacked along dim 0. The last
# column says when the model has the parameter. Weights are decayed, vectors (norms, biases) are
# not. An adapter's two matrices follow the weight they are beside (`_adapters`).
# fmt: off
TABLE: tuple[tuple[str, str, Split, Init, str], ...] = (
    ("model.embed_tokens.weight",                  "VD", _VOCAB,   _NORMAL, "always"),
    ("S.embed_positions.weight",                   "PD", _WHOLE,   _NORMAL, "learned"),
    ("S.embed_types.weight",                       "YD", _WHOLE,   _NORMAL, "types"),
    ("S.embed_norm.weight",                        "D",  _WHOLE,   _ONES,   "embed_norm"),
    ("S.embed_norm.bias",                          "D",  _WHOLE,   _ZEROS,  "embed_norm layernorm"),
    ("S.relative_attention_bias.weight",           "BN", _COLUMNS, _NORMAL, "relative"),
    ("S.layers.N.input_layernorm.weight",          "D",  _WHOLE,   _ONES,   "always"),
    ("S.layers.N.input_layernorm.bias",            "D",  _WHOLE,   _ZEROS,  "layernorm"),
    ("S.layers.N.self_attn.qkv_proj.weight",
     "q_proj QD + k_proj KD + v_proj KD",                _HEADS,   _NORMAL, "always"),
    ("S.layers.N.self_attn.qkv_proj.bias",
     "q_proj Q + k_proj K + v_proj K",                   _HEADS,   _ZEROS,  "attention_bias"),
    ("S.layers.N.self_attn.q_norm.weight",         "H",  _WHOLE,   _ONES,   "qk_norm"),
    ("S.layers.N.self_attn.k_norm.weight",         "H",  _WHOLE,   _ONES,   "qk_norm"),
    ("S.layers.N.self_attn.o_proj.weight",         "DQ", _COLUMNS, _SCALED, "always"),
    ("S.layers.N.self_attn.o_proj.bias",           "D",  _WHOLE,   _ZEROS,  "output_bias"),
    ("S.layers.N.cross_attn_layernorm.weight",     "D",  _WHOLE,   _ONES,   "cross"),
    ("S.layers.N.cross_attn_layernorm.bias",       "D",  _WHOLE,   _ZEROS,  "cross layernorm"),
    ("S.layers.N.cross_attn.q_proj.weight",        "QD", _HEADS,   _NORMAL, "cross"),
    ("S.layers.N.cross_attn.q_proj.bias",          "Q",  _HEADS,   _ZEROS,  "cross attention_bias"),
    ("S.layers.N.cross_attn.kv_proj.weight",
     "k_proj KD + v_proj KD",                            _HEADS,   _NORMAL, "cross"),
    ("S.layers.N.cross_attn.kv_proj.bias",
     "k_proj K + v_proj K",                              _HEADS,   _ZEROS,  "cross attention_bias"),
    ("S.layers.N.cross_attn.o_proj.weight",        "DQ", _COLUMNS, _SCALED, "cross"),
    ("S.layers.N.cross_attn.o_proj.bias",          "D",  _WHOLE,   _ZEROS,  "cross output_bias"),
    ("S.layers.N.post_attention_layernorm.weight", "D",  _WHOLE,   _ONES,   "always"),
    ("S.layers.N.post_attention_layernorm.bias",   "D",  _WHOLE,   _ZEROS,  "layernorm"),
    ("S.layers.N.mlp.gate_up_proj.weight",
     "gate_proj FD + up_proj FD",                        _ROWS,    _NORMAL, "gated"),
    ("S.layers.N.mlp.gate_up_proj.bias",
     "gate_proj F + up_proj F",                          _ROWS,    _ZEROS,  "gated mlp_bias"),
    ("S.layers.N.mlp.up_proj.weight",              "FD", _ROWS,    _NORMAL, "plain"),
    ("S.layers.N.mlp.up_proj.bias",                "F",  _ROWS,    _ZEROS,  "plain mlp_bias"),
    ("S.layers.N.mlp.down_proj.weight",            "DF", _COLUMNS, _SCALED, "always"),
    ("S.layers.N.mlp.down_proj.bias",              "D",  _WHOLE,   _ZEROS,  "mlp_bias"),
    ("S.norm.weight",                              "D",  _WHOLE,   _ONES,   "pre"),
    ("S.norm.bias",                                "D",  _WHOLE,   _ZEROS,  "pre layernorm"),
    ("lm_transform.dense.weight",                  "DD", _WHOLE,   _NORMAL, "lm encoder"),
    ("lm_transform.dense.bias",                    "D",  _WHOLE,   _ZEROS,  "lm encoder"),
    ("lm_transform.norm.weight",                   "D",  _WHOLE,   _ONES,   "lm encoder"),
    ("lm_transform.norm.bias",                     "D",  _WHOLE,   _ZEROS,  "lm encoder layernorm"),
    ("lm_head.weight",                             "VD", _VOCAB,   _NORMAL, "lm untied"),
    ("lm_head.bias",                               "V",  _VOCAB,   _ZEROS,  "lm encoder"),
    ("score.weight",                               "CD", _WHOLE,   _NORMAL, "labels"),
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
        return self.decay and ".layers." in self.name and not self.is_adapter

    @property
    def is_adapter(self) -> bool:
        """Whether it is one of the two matrices beside a frozen one."""
        return self.name.endswith((".lora_A", ".lora_B"))


@dataclass(frozen=True)
class Piece:
    """The box `source` of a canonical tensor lies at the box `target` of a local parameter."""

    tensor: Tensor
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def stacks(model: ModelConfig) -> dict[str, int]:
    """The stacks of blocks of a model: the layers of each, by the name of its module."""
    if model.architecture != "encoder_decoder":
        return {"model": model.num_hidden_layers}
    decoder = model.num_decoder_layers or model.num_hidden_layers
    return {"model.encoder": model.num_hidden_layers, "model.decoder": decoder}


def lengths(config: RunConfig) -> dict[str, int]:
    """The tokens of a sample that each stack of a run's model sees, by the stack's name."""
    if config.model.architecture != "encoder_decoder":
        return {"model": config.data.sequence_length}
    return {"model.encoder": source_length(config), "model.decoder": target_length(config)}


@lru_cache(maxsize=64)
def parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """The parameters of a model, in the order of its `named_parameters()`."""
    return tuple(_parameters(model))


def _parameters(model: ModelConfig) -> Iterator[Parameter]:
    sizes = _sizes(model)
    of_stacks = [i for i, row in enumerate(TABLE) if row[0].startswith("S.")]
    of_layers = [i for i, row in enumerate(TABLE) if ".N." in row[0]]
    first, last = slice(of_stacks[0]), slice(of_stacks[-1] + 1, None)
    before = slice(of_stacks[0], of_layers[0])
    layer = slice(of_layers[0], of_layers[-1] + 1)
    after = slice(of_layers[-1] + 1, of_stacks[-1] + 1)

    def rows(part: slice, has: dict[str, bool], stack: str = "", number: int = 0) -> Any:
        for row in TABLE[part]:
            if all(has[word] for word in row[4].split()):
                name = row[0].replace("S.", f"{stack}.", 1) if stack else row[0]
                parameter = _parameter(name.replace(".N.", f".{number}."), row, sizes)
                yield parameter
                if model.adapter and parameter.is_matrix_of_block:
                    yield from _adapters(parameter, model.adapter)

    has = _conditions(model)
    yield from rows(first, has)
    for stack, layers in stacks(model).items():
        own = has | {"cross": stack == "model.decoder"}
        yield from rows(before, own, stack)
        for number in range(layers):
            yield from rows(layer, own, stack, number)
        yield from rows(after, own, stack)
    yield from rows(last, has)


def tensors(model: ModelConfig) -> dict[str, Tensor]:
    """The canonical tensors of a model by name, in the order of its parameters."""
    return {t.name: t for parameter in parameters(model) for t in parameter.tensors}


def local_shape(parameter: Parameter, at: Coordinate = WHOLE) -> tuple[int, ...]:
    """Return the shape of a parameter on a rank, padding included."""
    locals_ = [_local(tensor, at.mesh.tensor) for tensor in parameter.tensors]
    return (sum(shape[0] for shape in locals_), *locals_[0][1:])


def pieces(parameter: Parameter, at: Coordinate = WHOLE) -> tuple[Piece, ...]:
    """Return which boxes of which canonical tensors a rank's parameter is made of.

    What of the parameter no piece covers is padding of the vocabulary, which is zero.
    """
    return tuple(_pieces(parameter, at.mesh.tensor, at.tensor_rank))


def _conditions(model: ModelConfig) -> dict[str, bool]:
    return {
        "always": True,
        "learned": model.position_embedding == "learned",
        "relative": model.position_embedding == "relative",
        "types": model.type_vocab_size > 0,
        "embed_norm": model.embedding_norm,
        "layernorm": model.norm == "layernorm",
        "pre": model.norm_position == "pre",
        "attention_bias": model.attention_bias,
        "output_bias": model.attention_output_bias,
        "qk_norm": model.qk_norm,
        "mlp_bias": model.mlp_bias,
        "gated": model.gated,
        "plain": not model.gated,
        "encoder": model.architecture == "encoder",
        "lm": model.num_labels == 0,
        "labels": model.num_labels > 0,
        "untied": not model.tie_word_embeddings,
    }


def _sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "V": model.vocab_size,
        "C": model.num_labels,
        "P": model.max_position_embeddings,
        "Y": model.type_vocab_size,
        "B": model.relative_attention_num_buckets,
        "D": model.hidden_size,
        "F": model.intermediate_size,
        "N": model.num_attention_heads,
        "H": model.head_dim,
        "Q": model.num_attention_heads * model.head_dim,
        "K": model.num_key_value_heads * model.head_dim,
    }


def _parameter(
    name: str, row: tuple[str, str, Split, Init, str], sizes: dict[str, int]
) -> Parameter:
    _, stack, split, init, _ = row
    *owner, module, kind = name.split(".")
    parts = []
    for item in stack.split(" + "):
        own, _, symbols = item.rpartition(" ")
        shape = tuple(sizes[symbol] for symbol in symbols)
        parts.append(Tensor(".".join((*owner, own or module, kind)), shape, split))
    return Parameter(name, tuple(parts), init, decay=len(parts[0].shape) > 1)


def _adapters(target: Parameter, adapter: AdapterConfig) -> Iterator[Parameter]:
    """A and B beside a weight: those of its tensors that have one are stacked as they are.

    Of A and B one is split as the weight is; the other meets all of what it reads or writes.
    """
    own = [t for t in target.tensors if t.name.split(".")[-2] in adapter.targets]
    name = target.name.removesuffix("weight")
    for kind, init in (("lora_A", Init.ADAPTER), ("lora_B", Init.ZEROS)) if own else ():
        parts = []
        for tensor in own:
            rows, columns = tensor.shape
            reads = kind == "lora_A"
            shape = (adapter.rank, columns) if reads else (rows, adapter.rank)
            follows = (tensor.split is Split.COLUMNS) == reads
            split = tensor.split if follows else Split.REPLICATED
            parts.append(Tensor(tensor.name.removesuffix("weight") + kind, shape, split))
        yield Parameter(name + kind, tuple(parts), init, decay=True)


def sees_part(parameter: Parameter, *, sequence: bool) -> bool:
    """Whether a parameter that every tensor rank holds whole meets a part of the tokens or heads.

    Its gradients are summed over the ranks.
    """
    if parameter.tensors[0].split is not Split.REPLICATED:
        return False
    if parameter.name.endswith(("q_norm.weight", "k_norm.weight")):
        return True
    own_tokens = ("model.norm.", "model.encoder.norm.", "model.decoder.norm.", "lm_transform.")
    return sequence and (".layers." in parameter.name or parameter.name.startswith(own_tokens))


def chunk_rows(vocabulary: int) -> int:
    """Tokens whose fp32 logits exist at once in the fused head and loss.

    They fill 128 MiB; a multiple of 64 for the matrix product's sake.
    """
    return max(64, _CHUNK_ELEMENTS // vocabulary // 64 * 64)


def head_rows(rows: int, targets: int) -> int:
    """Rows of a micro-batch that the head and its loss are computed for.

    Those that count, rounded up so that few sizes occur; all of them where that saves little.
    """
    rounded = max(64, -(-targets // 64) * 64)
    return rounded if 4 * rounded <= 3 * rows else rows


def counted(config: RunConfig, rows: int) -> int:
    """How many of `rows` places are to be named, on the mean."""
    return math.ceil(rows * counted_share(config))


def counted_share(config: RunConfig) -> float:
    """The part of a window's places that are to be named: the hidden ones, or all."""
    hides = config.objective.name == "masked" and config.finetune is None
    return config.objective.mask_probability if hides else 1.0


def base(model: ModelConfig) -> ModelConfig:
    """The language model that a classifier, or one with adapters, is made from."""
    return model.model_copy(update={"num_labels": 0, "adapter": None})


def learns(config: RunConfig, parameter: Parameter) -> bool:
    """Whether a parameter is trained: all, or those that fine-tuning does not freeze."""
    return learns_under(config.finetune, parameter)


def learns_under(tuning: FinetuneConfig | None, parameter: Parameter) -> bool:
    """`learns` by the section that decides it."""
    if tuning is None:
        return True
    if tuning.adapter and not (parameter.is_adapter or parameter.name == "score.weight"):
        return False
    return not any(fnmatch.fnmatchcase(parameter.name, pattern) for pattern in tuning.freeze)


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
