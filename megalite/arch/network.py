"""The parts of a model in order:

    embedding, then for each stack: entry, blocks, final norm; then the head

The table of parameters consists of the `rows` of these parts. Its order is that of the model's
`named_parameters()`.
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
        parts: the residual branches in order.
    """

    name: str
    parts: tuple[Part, ...]

    def specs(self, model: ModelConfig, part: Part) -> list[ParameterSpec]:
        """Return the parameters of one of the block's parts, adapters included."""
        return list(_specs(model, part, f"{self.name}.", block=self.name))


@dataclass(frozen=True)
class Stack:
    """A stack of blocks, with its input and its final norm.

    Attributes:
        name: dotted name of its module.
        reads_memory: whether the blocks attend to the output of the encoder.
    """

    name: str
    reads_memory: bool
    entry: Entry
    layers: tuple[Layer, ...]
    norm: FinalNorm

    def specs(self, model: ModelConfig, part: Part) -> list[ParameterSpec]:
        """Return the parameters of the stack's entry or norm."""
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
    all_stacks = []
    for name, layers in stacks(model).items():
        decodes = name == "model.decoder"
        causal = decodes or model.architecture == "decoder"
        windows = layer_windows(model, layers)
        cross = (CrossAttention(),) if decodes else ()
        blocks = tuple(
            Layer(f"{name}.layers.{number}", (SelfAttention(causal, window), *cross, MLP()))
            for number, window in enumerate(windows)
        )
        entry = Entry(tuple(dict.fromkeys(windows)))
        all_stacks.append(Stack(name, decodes, entry, blocks, FinalNorm()))
    head = LabelHead() if model.num_labels else LanguageHead()
    return Network(TokenEmbedding(), tuple(all_stacks), head)


def stacks(model: ModelConfig) -> dict[str, int]:
    """Return how many blocks each stack has, by the name of the stack's module."""
    if model.architecture != "encoder_decoder":
        return {"model": model.num_hidden_layers}
    decoder = model.num_decoder_layers or model.num_hidden_layers
    return {"model.encoder": model.num_hidden_layers, "model.decoder": decoder}


def layer_windows(model: ModelConfig, layers: int) -> list[int | None]:
    """Return the attention window of each block of a stack in tokens. None means all."""
    return [
        model.sliding_window if kind == "sliding_attention" else None
        for kind in layer_types(model, layers)
    ]


def layer_types(model: ModelConfig, layers: int) -> list[LayerType]:
    """Return the kind of attention of each block of a stack.

    A list that is shorter than the stack is repeated. Without a list all blocks are of one kind.
    """
    if model.layer_types:
        return list(model.layer_types) * (layers // len(model.layer_types))
    return ["sliding_attention" if model.sliding_window else "full_attention"] * layers


def lengths(config: RunConfig) -> dict[str, int]:
    """Return the tokens of a sample that each stack of a run's model sees, by the stack's name."""
    return stack_lengths(
        config.model, config.data.sequence_length, source_length(config), target_length(config)
    )


def stack_lengths(model: ModelConfig, tokens: int, source: int, target: int) -> dict[str, int]:
    """Return the tokens of a sample that each stack sees, by the stack's name.

    Args:
        tokens: the result for a model with a single stack.
        source: the result for the encoder of a model with two stacks.
        target: the result for the decoder of a model with two stacks.
    """
    if model.architecture != "encoder_decoder":
        return {"model": tokens}
    return {"model.encoder": source, "model.decoder": target}


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
    """Return the parameters of a block's part, adapters included, by names within the block."""
    return list(_specs(model, part, "", block="block"))


def _specs(model: ModelConfig, part: Part, prefix: str, *, block: str) -> Iterator[ParameterSpec]:
    for row in part.rows(model, prefix):
        # under sequence parallelism the blocks of a rank see only the rank's own tokens
        sees = Sees.OWN_TOKENS if row.sees is Sees.EVERYTHING else row.sees
        spec = replace(row, block=block, sees=sees)
        yield spec
        if model.adapter and spec.is_matrix_of_block:
            yield from _adapters(spec, model.adapter)


def _adapters(target: ParameterSpec, adapter: AdapterConfig) -> Iterator[ParameterSpec]:
    """Yield the matrices A and B of LoRA (Hu et al. 2021) for a weight.

    A fused weight has an A and a B for each adapted projection, stacked in order. The ranks split
    one of A and B as they split the weight. Each rank holds the other one whole.
    """
    adapted = [t for t in target.tensors if t.name.split(".")[-2] in adapter.targets]
    name = target.name.removesuffix("weight")
    for kind, init in (("lora_A", Init.ADAPTER), ("lora_B", Init.ZEROS)) if adapted else ():
        parts = []
        for tensor in adapted:
            rows, columns = tensor.shape
            is_A = kind == "lora_A"
            shape = (adapter.rank, columns) if is_A else (rows, adapter.rank)
            is_split = (tensor.split is Split.INPUT_DIM) == is_A
            split = tensor.split if is_split else Split.REPLICATED
            parts.append(CanonicalTensor(tensor.name.removesuffix("weight") + kind, shape, split))
        yield replace(target, name=name + kind, tensors=tuple(parts), init=init, is_adapter=True)


def tensors(model: ModelConfig) -> dict[str, CanonicalTensor]:
    """Return the canonical tensors of a model by name, in the order of its parameters."""
    return {t.name: t for spec in parameters(model) for t in spec.tensors}


def base_model(model: ModelConfig) -> ModelConfig:
    """Return the language model that a classifier or a model with adapters starts from."""
    return model.model_copy(update={"num_labels": 0, "adapter": None})


def is_trainable(config: RunConfig, spec: ParameterSpec) -> bool:
    """Return whether a run trains a parameter: fine-tuning may freeze it."""
    return is_trainable_under(config.finetune, spec)


def is_trainable_under(finetune: FinetuneConfig | None, spec: ParameterSpec) -> bool:
    """Return whether a fine-tuning section trains a parameter. None means pretraining."""
    if finetune is None:
        return True
    if finetune.adapter and not (spec.is_adapter or spec.is_label_head):
        return False
    return not any(fnmatch.fnmatchcase(spec.name, pattern) for pattern in finetune.freeze)
