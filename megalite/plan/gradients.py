"""The gradients that a backward computes; a fine-tuning run saves those of frozen parts.

A product's backward makes the gradient of its weight if the weight is trained, and that of its
input if anything below the product is trained. First layers that are frozen with all below them
have no backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megalite import arch
from megalite.arch.ends import FIRST_BLOCK
from megalite.arch.part import Flow, Grads
from megalite.config import FinetuneConfig, ModelConfig


@dataclass(frozen=True)
class StackGradients:
    """The gradients of one stack.

    Attributes:
        entry: those of its embeddings, and whether the input of its first block has one.
        layers: those of each block, by names within the block.
    """

    entry: Grads
    layers: tuple[Grads, ...]


@dataclass(frozen=True)
class Gradients:
    """The gradients of one backward.

    Attributes:
        trained: names of the parameters that have one.
        stacks: the gradients of each stack, in order.
        head: the gradients of the head, by the names of its weights.
    """

    trained: frozenset[str]
    stacks: tuple[StackGradients, ...]
    head: Grads

    @property
    def share(self) -> float:
        """Return the share of the blocks that have a backward."""
        layers = [grads for stack in self.stacks for grads in stack.layers]
        return sum(grads.has_backward for grads in layers) / len(layers)


@lru_cache(maxsize=64)
def gradients(model: ModelConfig, tuning: FinetuneConfig | None) -> Gradients:
    """Return the gradients of a model under a fine-tuning section; None means pretraining."""
    specs = arch.parameters(model)
    trained = frozenset(s.name for s in specs if arch.is_trainable_under(tuning, s))
    parts = arch.network(model)
    flow = Flow(trained)
    found = []
    for stack in parts.stacks:
        stack.entry.follow(model, stack.specs(model, stack.entry), flow)
        entry = Grads(trained, frozenset([FIRST_BLOCK] if flow.hidden else []))
        layers = []
        for layer in stack.layers:
            for part in layer.parts:
                part.follow(model, layer.specs(model, part), flow)
            layers.append(_within(layer.name, flow))
        stack.norm.follow(model, stack.specs(model, stack.norm), flow)
        flow.memory = flow.hidden
        found.append(StackGradients(entry, tuple(layers)))
    parts.head.follow(model, list(parts.head.rows(model, "")), flow)
    return Gradients(trained, tuple(found), Grads(trained, frozenset(flow.inputs)))


def _within(layer: str, flow: Flow) -> Grads:
    """Return a block's gradients by names within the block, which equal blocks share."""
    lead = f"{layer}."
    trained, inputs = (
        frozenset(name.removeprefix(lead) for name in names if name.startswith(lead))
        for names in (flow.trained, flow.inputs)
    )
    return Grads(trained, inputs)
