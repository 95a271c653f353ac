"""Which gradients a backward makes, by what learns: the rest of a fine-tuning run costs nothing.

A product's backward makes the gradient of its weight where that learns, and that of its input where
something below it learns. First layers that are frozen with all below them have no backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from megalite import arch
from megalite.config import FinetuneConfig, ModelConfig

HEAD = "head"  # the hidden states that the head reads


@dataclass(frozen=True)
class Gradients:
    """The gradients of one backward.

    Attributes:
        learned: names of the parameters that have one.
        passed: names of the parameters whose input has one; `HEAD`; and "S.layers" of each stack
            whose first block's input has one.
        blocks: those that have a backward, such as "model.layers.0".
    """

    learned: frozenset[str]
    passed: frozenset[str]
    blocks: frozenset[str]

    def products(self, weight: str) -> int:
        """How many products a backward makes for one of the forward, by its weight's name."""
        return (weight in self.learned) + (weight in self.passed)

    def share(self, model: ModelConfig) -> float:
        """The part of the blocks that have a backward."""
        return len(self.blocks) / sum(arch.stacks(model).values())

    def of_head(self, model: ModelConfig) -> int:
        """`products` of the head, which may be the embedding's weight a second time."""
        return (head_weight(model) in self.learned) + (HEAD in self.passed)


def head_weight(model: ModelConfig) -> str:
    """The name of the weight that a model ends in."""
    if model.num_labels:
        return "score.weight"
    return "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"


@lru_cache(maxsize=64)
def gradients(model: ModelConfig, tuning: FinetuneConfig | None) -> Gradients:
    """Those of a model that learns as a fine-tuning section says; None: all of it learns."""
    rows = arch.parameters(model)
    learned = frozenset(row.name for row in rows if arch.is_trainable_under(tuning, row))
    passed = frozenset(_passed(model, learned))
    within = (name.partition(".layers.") for name in learned | passed)
    blocks = frozenset(f"{stack}.layers.{rest.split('.')[0]}" for stack, _, rest in within if rest)
    return Gradients(learned, passed, blocks)


def _passed(model: ModelConfig, learned: frozenset[str]) -> Iterator[str]:
    """Follows the forward: a hidden state has a gradient once something on its way learns."""
    names = [row.name for row in arch.parameters(model)]
    hidden = memory = False
    for stack in arch.stacks(model):
        hidden = "model.embed_tokens.weight" in learned
        read = bias = entered = False
        for name in _by_time(model, (name for name in names if name.startswith(f"{stack}."))):
            if ".layers." in name and not entered:
                entered = True
                if hidden:
                    yield f"{stack}.layers"
            if ".relative_attention_bias." in name:  # goes into the scores of every block
                bias = name in learned
                continue
            if ".cross_attn.kv_proj." in name:  # reads what the other stack gave
                read = memory if name.endswith(".weight") else read
                if read:
                    yield name
                read |= name in learned
                continue
            if name.endswith("attn.o_proj.weight"):
                hidden |= read if ".cross_attn." in name else bias
            if hidden:
                yield name
            hidden |= name in learned
        memory = hidden
    if hidden or any(name.startswith("lm_transform.") for name in learned):
        yield HEAD


def _by_time(model: ModelConfig, names: Iterable[str]) -> Iterator[str]:
    """A stack's parameters as its forward meets them: a post-norm comes after its branch."""
    held: list[str] = []
    for name in names:
        if model.norm_position == "pre" or "layernorm." not in name:
            yield name
            continue
        if held and held[0].rpartition(".")[0] != name.rpartition(".")[0]:
            yield from held
            held = []
        held.append(name)
    yield from held
