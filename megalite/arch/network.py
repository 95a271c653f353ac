"""The parts of a model in order: its stacks of blocks, and what surrounds them.

    embedding, then for each stack: entry, blocks, final norm; then the head

A parameter is in the table because a part's `rows` yields it. The order of `parameters` is that of
the model's `named_parameters()`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from megalite.arch.attention import CrossAttention, SelfAttention
from megalite.arch.ends import Entry, FinalNorm, LabelHead, LanguageHead, TokenEmbedding
from megalite.arch.mlp import MLP
from megalite.arch.part import Part
from megalite.arch.table import CanonicalTensor, Init, ParameterSpec, Sees, Split
from megalite.config import (
    AdapterConfig,
    FinetuneConfig,
    LayerType,
    ModelConfig,
    RunConfig,
    source_length,
    target_length,
)


@dataclass(frozen=True)
class Layer:
    """A block of a stack.

    Attributes:
        name: dotted name of its module, such as "model.layers.0".
        parts: its residual branches in order.
    """

    name: str
    parts: tuple[Part, ...]

    def specs(self, model: ModelConfig, part: Part) -> list[ParameterSpec]:
        """Return the parameters of one of its parts, adapters included."""
        return list(_specs(model, part, f"{self.name}.", block=self.name))


@dataclass(frozen=True)
class Stack:
    """A stack of blocks, and what surrounds them.

    Attributes:
        name: dotted name of its module.
        reads_memory: whether its blocks attend to the stack before it.
    """

    name: str
    reads_memory: bool
    entry: Entry
    layers: tuple[Layer, ...]
    norm: FinalNorm

    def specs(self, model: ModelConfig, part: Part) -> list[ParameterSpec]:
        """Return the parameters of its entry or its norm."""
        return list(part.rows(model, f"{self.name}."))


@dataclass(frozen=True)
class Network:
    """The parts of a model in order."""

    embedding: TokenEmbedding
    stacks: tuple[Stack, ...]
    head: LanguageHead | LabelHead


@lru_cache(maxsize=64)
def network(model: ModelConfig) -> Network:
    """Return the parts of a model."""
    found = []
    for name, layers in stacks(model).items():
        writes = name == "model.decoder"
        causal = writes or model.architecture == "decoder"
        windows = layer_windows(model, layers)
        between = (CrossAttention(),) if writes else ()
        blocks = tuple(
            Layer(f"{name}.layers.{number}", (SelfAttention(causal, window), *between, MLP()))
            for number, window in enumerate(windows)
        )
        entry = Entry(tuple(dict.fromkeys(windows)))
        found.append(Stack(name, writes, entry, blocks, FinalNorm()))
    head = LabelHead() if model.num_labels else LanguageHead()
    return Network(TokenEmbedding(), tuple(found), head)


def stacks(model: ModelConfig) -> dict[str, int]:
    """Return how many blocks each stack has, by the name of the stack's module."""
    if model.architecture != "encoder_decoder":
        return {"model": model.num_hidden_layers}
    decoder = model.num_decoder_layers or model.num_hidden_layers
    return {"model.encoder": model.num_hidden_layers, "model.decoder": decoder}


def layer_windows(model: ModelConfig, layers: int) -> list[int | None]:
    """Return the tokens that each block of a stack looks back at; None means all."""
    return [
        model.sliding_window if kind == "sliding_attention" else None
        for kind in layer_types(model, layers)
    ]


def layer_types(model: ModelConfig, layers: int) -> list[LayerType]:
    """Return the kind of attention of each block of a stack.

    A list that is shorter than the stack is repeated. Without a list all blocks are identical.
    """
    if model.layer_types:
        return list(model.layer_types) * (layers // len(model.layer_types))
    return ["sliding_attention" if model.sliding_window else "full_attention"] * layers


def lengths(config: RunConfig) -> dict[str, int]:
    """Return the tokens of a sample that each stack of a run's model sees, by the stack's name."""
    return stack_lengths(
        config.model, config.data.sequence_length, source_length(config), target_length(config)
    )


def stack_lengths(model: ModelConfig, tokens: int, read: int, written: int) -> dict[str, int]:
    """Return the tokens of a sample that each stack sees, by the stack's name.

    Args:
        tokens: of a model with a single stack.
        read, written: of the encoder and the decoder of a model with two.
    """
    if model.architecture != "encoder_decoder":
        return {"model": tokens}
    return {"model.encoder": read, "model.decoder": written}


@lru_cache(maxsize=64)
def parameters(model: ModelConfig) -> tuple[ParameterSpec, ...]:
    """Return the parameters of a model, in the order of its `named_parameters()`."""
    return tuple(_parameters(model))


def _parameters(model: ModelConfig) -> Iterator[ParameterSpec]:
    parts = network(model)
    yield from parts.embedding.rows(model, "model.")
    for stack in parts.stacks:
        yield from stack.specs(model, stack.entry)
        for layer in stack.layers:
            for part in layer.parts:
                yield from layer.specs(model, part)
        yield from stack.specs(model, stack.norm)
    yield from parts.head.rows(model, "")


def block_specs(model: ModelConfig, part: Part) -> list[ParameterSpec]:
    """Return the parameters of a block's part by names within the block, adapters included."""
    return list(_specs(model, part, "", block="block"))


def _specs(model: ModelConfig, part: Part, prefix: str, *, block: str) -> Iterator[ParameterSpec]:
    for row in part.rows(model, prefix):
        # under sequence parallelism a rank's blocks see its own tokens
        sees = Sees.OWN_TOKENS if row.sees is Sees.EVERYTHING else row.sees
        spec = replace(row, block=block, sees=sees)
        yield spec
        if model.adapter and spec.is_matrix_of_block:
            yield from _adapters(spec, model.adapter)


def _adapters(target: ParameterSpec, adapter: AdapterConfig) -> Iterator[ParameterSpec]:
    """Yield the matrices A and B of LoRA (Hu et al. 2021) next to a weight.

    Those of its fused tensors that have an adapter are stacked in order. One of A and B is split as
    the weight is; the other meets all that the adapter reads or writes.
    """
    adapted = [t for t in target.tensors if t.name.split(".")[-2] in adapter.targets]
    name = target.name.removesuffix("weight")
    for kind, init in (("lora_A", Init.ADAPTER), ("lora_B", Init.ZEROS)) if adapted else ():
        parts = []
        for tensor in adapted:
            rows, columns = tensor.shape
            reads = kind == "lora_A"
            shape = (adapter.rank, columns) if reads else (rows, adapter.rank)
            follows = (tensor.split is Split.INPUT_DIM) == reads
            split = tensor.split if follows else Split.REPLICATED
            parts.append(CanonicalTensor(tensor.name.removesuffix("weight") + kind, shape, split))
        yield replace(target, name=name + kind, tensors=tuple(parts), init=init, is_adapter=True)


def tensors(model: ModelConfig) -> dict[str, CanonicalTensor]:
    """Return the canonical tensors of a model by name, in the order of its parameters."""
    return {t.name: t for spec in parameters(model) for t in spec.tensors}


def base_model(model: ModelConfig) -> ModelConfig:
    """Return the language model that a classifier, or one with adapters, starts from."""
    return model.model_copy(update={"num_labels": 0, "adapter": None})


def is_trainable(config: RunConfig, spec: ParameterSpec) -> bool:
    """Return whether a run trains a parameter: fine-tuning may freeze it."""
    return is_trainable_under(config.finetune, spec)


def is_trainable_under(tuning: FinetuneConfig | None, spec: ParameterSpec) -> bool:
    """Return whether a fine-tuning section trains a parameter; None means pretraining."""
    if tuning is None:
        return True
    if tuning.adapter and not (spec.is_adapter or spec.is_label_head):
        return False
    return not any(fnmatch.fnmatchcase(spec.name, pattern) for pattern in tuning.freeze)
