"""The costs of a model's parts. FLOPs, bytes, messages and seconds are sums over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from megalite import arch
from megalite.arch.network import block_specs
from megalite.arch.part import Cost, Grads, Part, Workload
from megalite.config import FinetuneConfig, ModelConfig
from megalite.plan.gradients import gradients


@dataclass(frozen=True)
class StackCosts:
    """The costs of one stack.

    Attributes:
        load: the work of its blocks.
        entry: the cost of its embeddings.
        layers: the costs of each block's parts.
        kinds: the costs of each kind of block, with the number of such blocks.
        norm: the cost of its final norm.
    """

    load: Workload
    entry: Cost
    layers: tuple[tuple[Cost, ...], ...]
    kinds: tuple[tuple[tuple[Cost, ...], int], ...]
    norm: Cost


@dataclass(frozen=True)
class ModelCosts:
    """The costs of a model's parts."""

    stacks: tuple[StackCosts, ...]
    head: Cost

    @property
    def parts(self) -> Iterator[Cost]:
        """Yield the costs of the parts of all blocks."""
        for stack in self.stacks:
            for layer in stack.layers:
                yield from layer

    @property
    def kinds(self) -> Iterator[tuple[Cost, int]]:
        """Yield the cost of each kind of part in the blocks, with the number of such parts."""
        for stack in self.stacks:
            for layer, count in stack.kinds:
                yield from ((part, count) for part in layer)

    @property
    def ends(self) -> Iterator[Cost]:
        """Yield the costs of the parts outside the blocks."""
        for stack in self.stacks:
            yield stack.entry
            yield stack.norm
        yield self.head


def workloads(
    model: ModelConfig, lengths: Mapping[str, int], common: Workload, *, masks: bool = False
) -> tuple[Workload, ...]:
    """Return the workload of each stack.

    Args:
        lengths: tokens of a sample in each stack, by the stack's name.
        masks: whether documents or padding need attention masks. Never applies to a second stack.
    """
    loads = []
    previous = 0
    for stack in arch.network(model).stacks:
        tokens = lengths[stack.name]
        memory = previous if stack.reads_memory else 0
        loads.append(
            replace(
                common,
                tokens=tokens,
                memory_tokens=memory,
                sample_masks=masks and not stack.reads_memory,
            )
        )
        previous = tokens
    return tuple(loads)


@lru_cache(maxsize=64)
def model_costs(
    model: ModelConfig, tuning: FinetuneConfig | None, loads: tuple[Workload, ...]
) -> ModelCosts:
    """Return the costs of a model's parts.

    Args:
        loads: the workload of each stack.
    """
    parts = arch.network(model)
    grads = gradients(model, tuning)
    stacks = []
    for stack, load, stack_grads in zip(parts.stacks, loads, grads.stacks, strict=True):
        keys = [
            (layer.parts, layer_grads)
            for layer, layer_grads in zip(stack.layers, stack_grads.layers, strict=True)
        ]
        # equal blocks cost the same
        costs = {key: _layer_costs(model, *key, load) for key in set(keys)}
        layers = tuple(costs[key] for key in keys)
        kinds = tuple((costs[key], count) for key, count in Counter(keys).items())
        entry = stack.entry.cost(model, stack.specs(model, stack.entry), load, stack_grads.entry)
        norm = stack.norm.cost(model, stack.specs(model, stack.norm), load, stack_grads.entry)
        stacks.append(StackCosts(load, entry, layers, kinds, norm))
    head = parts.head.cost(model, list(parts.head.rows(model, "")), loads[-1], grads.head)
    return ModelCosts(tuple(stacks), head)


def _layer_costs(
    model: ModelConfig, parts: tuple[Part, ...], grads: Grads, load: Workload
) -> tuple[Cost, ...]:
    load = replace(load, recompute=load.recompute and grads.has_backward)
    return tuple(part.cost(model, block_specs(model, part), load, grads) for part in parts)
