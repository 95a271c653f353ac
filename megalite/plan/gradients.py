"""The gradients that a backward computes. Fine-tuning skips those of frozen parts.

The backward of a matrix product computes the gradient of its weight if the weight is trained. It
computes the gradient of its input if any parameter before it is trained. The first layers have no
backward if they are frozen with everything before them.
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
        entry: gradients of its embeddings, and of the input of its first block.
        layers: gradients of each block, by names within the block.
    """

    entry: Grads
    layers: tuple[Grads, ...]


@dataclass(frozen=True)
class Gradients:
    """The gradients of one backward.

    Attributes:
        trained: names of the parameters that have a gradient.
        stacks: gradients of each stack, in order.
        head: gradients of the head, by the names of its weights.
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
    """Return the gradients of a model.

    Args:
        tuning: fine-tuning section, which decides what is trained. None means pretraining.
    """
    specs = arch.parameters(model)
    trained = frozenset(s.name for s in specs if arch.is_trainable_under(tuning, s))
    parts = arch.network(model)
    flow = Flow(trained)
    stacks = []
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
        stacks.append(StackGradients(entry, tuple(layers)))
    parts.head.follow(model, list(parts.head.rows(model, "")), flow)
    return Gradients(trained, tuple(stacks), Grads(trained, frozenset(flow.inputs)))


def _within(layer: str, flow: Flow) -> Grads:
    """Return a block's gradients by names within the block, which are the same in equal blocks."""
    lead = f"{layer}."
    trained, inputs = (
        frozenset(name.removeprefix(lead) for name in names if name.startswith(lead))
        for names in (flow.trained, flow.inputs)
    )
    return Grads(trained, inputs)
