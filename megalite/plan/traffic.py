"""What ranks send each other: every collective of a step, by its group, kind and size.

Those of the ranks that share a model (`megalite.parallel`) are exact: a rehearsal counts the same.
Those of the ranks that share a batch are DeepSpeed's, as its ZeRO stages move gradients and
weights; they are of the plan alone.

B samples of a micro-batch   T tokens of a sample   and the letters of `megalite.shapes`
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megalite import shapes
from megalite.config import RunConfig, source_length, target_length
from megalite.plan.memory import local_elements
from megalite.plan.sizes import Plan

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True, order=True)
class Collective:
    """A kind of call among the ranks of a group.

    Attributes:
        elements: of the whole tensor, which each rank has after an all_gather, and before others.
        count: calls a step.
    """

    group: Literal["tensor", "data"]
    kind: Kind
    dtype: str
    elements: int
    count: int

    @property
    def bytes(self) -> int:
        """Of the whole tensors, over all calls."""
        return self.count * self.elements * (4 if self.dtype == "fp32" else 2)

    def sent_bytes(self, ranks: int) -> float:
        """What a rank of a ring sends: all but its own part, twice for an all_reduce."""
        times = 2 if self.kind == "all_reduce" else 1
        return times * self.bytes * (ranks - 1) / ranks


def tensor_collectives(config: RunConfig, plan: Plan) -> tuple[Collective, ...]:
    """Those of the ranks that share a model, of one step of `config.training`'s micro-batches.

    Of a model that learns as a whole; adapters and frozen layers ask for other ones.
    """
    if plan.tensor_parallel == 1:
        return ()
    found = _Calls(config, plan).count()
    return tuple(
        sorted(
            Collective("tensor", kind, dtype, elements, count * plan.accumulation_steps)
            for (kind, dtype, elements), count in found.items()
            if count
        )
    )


class _Calls:
    """Counts the calls of one micro-batch, forward and backward."""

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        self._config, self._model, self._plan = config, config.model, plan
        self._found: Counter[tuple[Kind, str, int]] = Counter()
        self._sequence = config.parallel.sequence
        self._again = config.training.activation_checkpointing != "none"
        # what follows a block's last sum and is kept: then a recompute makes that sum as well
        post, drops = self._model.norm_position == "post", self._model.hidden_dropout > 0
        self._whole_again = post or drops

    def count(self) -> Counter[tuple[Kind, str, int]]:
        model, plan = self._model, self._plan
        B, T, D = plan.micro_batch_size, plan.sequence_length, model.hidden_size
        read = source_length(self._config)
        written = target_length(self._config)
        for stack, layers in shapes.stacks(model).items():
            tokens = T
            if model.architecture == "encoder_decoder":
                tokens = written if stack == "model.decoder" else read
            self._add("all_reduce", B * tokens * D)  # the embedding's sum
            if self._sequence:
                self._add("all_gather", B * tokens * D)  # the backward of taking one's own tokens
            cross = stack == "model.decoder" and model.architecture == "encoder_decoder"
            for _ in range(layers):
                self._block(B * tokens * D, B * read * D if cross else 0)
        self._ends(B, T if model.architecture != "encoder_decoder" else written)
        self._vectors()
        return self._found

    def _add(self, kind: Kind, elements: int, count: int = 1, dtype: str | None = None) -> None:
        if elements:
            self._found[kind, dtype or self._plan.precision, elements] += count

    def _block(self, whole: int, memory: int) -> None:
        """Attention, attention to what is read, and the MLP: a column and a row product each."""
        halves = 3 if memory else 2
        again = (halves if self._whole_again else halves - 1) if self._again else 0
        if not self._sequence:
            self._add("all_reduce", whole, 2 * halves + again)
            self._add("all_reduce", memory)
            return
        self._add("all_gather", whole, 3 * halves + (halves if self._again else 0))
        self._add("reduce_scatter", whole, 2 * halves + again)
        self._add("all_gather", memory, 3 if self._again else 2)
        self._add("reduce_scatter", memory)

    def _ends(self, B: int, tokens: int) -> None:
        """The head's input, and the exchange of its cross entropy."""
        model, plan = self._model, self._plan
        whole = B * tokens * model.hidden_size
        if self._sequence:
            self._add("all_gather", whole)
            self._add("reduce_scatter", whole)
        else:
            self._add("all_reduce", whole)
        rows = shapes.head_rows(B * tokens, shapes.counted(self._config, B * tokens))
        chunk = shapes.chunk_rows(-(-model.vocab_size // plan.tensor_parallel))
        for start in range(0, rows, chunk):
            size = min(chunk, rows - start)
            self._add("all_reduce", size, dtype="fp32")
            self._add("all_reduce", 2 * size, dtype="fp32")

    def _vectors(self) -> None:
        """Gradients of what every rank holds whole and meets with a part of the tokens or heads."""
        for row in shapes.parameters(self._model):
            if shapes.sees_part(row, sequence=self._sequence):
                self._add("all_reduce", row.elements)


def data_collectives(config: RunConfig, plan: Plan) -> tuple[Collective, ...]:
    """Those of the ranks that share a batch, of one step.

    As DeepSpeed 0.19 moves them: gradients in fp32 (communication_data_type), weights as they are
    multiplied. Stages 0 and 1 reduce once a step, stages 2 and 3 every micro-batch; stage 3 gathers
    the weights for each forward and each backward.
    """
    if plan.data_parallel == 1:
        return ()
    n = local_elements(config, plan.tensor_parallel, trained=True)
    every = local_elements(config, plan.tensor_parallel)
    times, stage = plan.accumulation_steps, plan.zero_stage
    rows: list[Collective] = []
    if stage in (0, 1):
        rows.append(Collective("data", "all_reduce", "fp32", n, 1))
    else:
        rows.append(Collective("data", "reduce_scatter", "fp32", n, times))
    if stage in (1, 2):
        rows.append(Collective("data", "all_gather", plan.precision, n, 1))
    if stage == 3:
        rows.append(Collective("data", "all_gather", plan.precision, every, 2 * times))
    return tuple(rows)
