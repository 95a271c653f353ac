"""What ranks send each other: every collective of a step, by its group, kind and size.

Those of the ranks that share a model (`megalite.parallel`) are exact: the dry run counts the same.
Those of the ranks that share a batch are DeepSpeed's, as its ZeRO stages move gradients and
weights, in the fewest calls that its buckets allow; they are of the plan alone.

B samples of a micro-batch   T tokens of a sample   and the letters of `megalite.shapes`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megalite import arch
from megalite.config import Precision, RunConfig, target_count
from megalite.plan.gradients import HEAD, gradients
from megalite.plan.sizes import Plan
from megalite.plan.zero import local_elements

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
    dtype: Precision
    elements: int
    count: int

    @property
    def bytes(self) -> int:
        """Of the whole tensors, over all calls."""
        return self.count * self.elements * self.dtype.bytes

    def sent_bytes(self, ranks: int) -> float:
        """What a rank of a ring sends: all but its own part, twice for an all_reduce."""
        times = 2 if self.kind == "all_reduce" else 1
        return times * self.bytes * (ranks - 1) / ranks


def tensor_collectives(config: RunConfig, plan: Plan) -> tuple[Collective, ...]:
    """Those of the ranks that share a model, of one step of `config.training`'s micro-batches."""
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
    """Counts the calls of one micro-batch, forward and backward: those of the backward where there
    is a gradient to be summed.
    """

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        self._config, self._model, self._plan = config, config.model, plan
        self._found: Counter[tuple[Kind, Precision, int]] = Counter()
        self._made = gradients(config.model, config.finetune)
        self._sequence = config.parallel.sequence
        self._again = config.training.activation_checkpointing != "none"
        # what follows a block's last sum and is kept: then a recompute makes that sum as well
        post, drops = self._model.norm_position == "post", self._model.hidden_dropout > 0
        self._whole_again = post or drops
        # of what an adapter's A gives, elements a token: [parts x rank]
        self._low = {
            row.name.removesuffix(".lora_A"): sum(tensor.shape[0] for tensor in row.tensors)
            for row in arch.parameters(self._model)
            if row.name.endswith(".lora_A")
        }

    def count(self) -> Counter[tuple[Kind, Precision, int]]:
        model, B, D = self._model, self._plan.micro_batch_size, self._model.hidden_size
        lengths = arch.lengths(self._config)
        for stack, layers in arch.stacks(model).items():
            tokens = B * lengths[stack]
            self._add("all_reduce", tokens * D)  # the embedding's sum
            if self._sequence and f"{stack}.layers" in self._made.passed:
                self._add("all_gather", tokens * D)  # the backward of taking one's own tokens
            read = B * lengths["model.encoder"] if stack == "model.decoder" else 0
            for number in range(layers):
                self._block(f"{stack}.layers.{number}", tokens, read)
        self._ends(B, [*lengths.values()][-1])
        self._vectors()
        return self._found

    def _add(
        self, kind: Kind, elements: int, count: int = 1, dtype: Precision | None = None
    ) -> None:
        if elements and count:
            self._found[kind, dtype or self._plan.precision, elements] += count

    def _block(self, block: str, tokens: int, read: int) -> None:
        """Attention, attention to what is read, and the MLP: a column and a row product each."""
        up = "gate_up_proj" if self._model.gated else "up_proj"
        again = self._again and block in self._made.blocks
        last = self._whole_again or f"{block}.mlp.down_proj" in self._low
        self._column(f"{block}.self_attn.qkv_proj", tokens, again)
        self._row(f"{block}.self_attn.o_proj", tokens, again)
        if read:
            self._column(f"{block}.cross_attn.q_proj", tokens, again)
            self._column(f"{block}.cross_attn.kv_proj", read, again)
            self._row(f"{block}.cross_attn.o_proj", tokens, again)
        self._column(f"{block}.mlp.{up}", tokens, again)
        self._row(f"{block}.mlp.down_proj", tokens, again and last)

    def _column(self, module: str, tokens: int, again: bool) -> None:
        """What every rank reads whole: gathered in the forward and for the weight's gradient."""
        whole, low = tokens * self._model.hidden_size, tokens * self._low.get(module, 0)
        passed = f"{module}.weight" in self._made.passed
        low_passed = self._made.products(f"{module}.lora_A") > 0
        if not self._sequence:
            self._add("all_reduce", whole, passed)
            self._add("all_reduce", low, low_passed)
            return
        self._add("all_gather", whole, 1 + again + (f"{module}.weight" in self._made.learned))
        self._add("reduce_scatter", whole, passed)
        self._add("all_gather", low, 1 + again)
        self._add("reduce_scatter", low, low_passed)

    def _row(self, module: str, tokens: int, again: bool) -> None:
        """What every rank has a part of: summed in the forward, and when that is done again."""
        whole, low = tokens * self._model.hidden_size, tokens * self._low.get(module, 0)
        if not self._sequence:
            self._add("all_reduce", whole, 1 + again)
            self._add("all_reduce", low, 1 + again)
            return
        for elements, weight in ((whole, "weight"), (low, "lora_A")):
            self._add("reduce_scatter", elements, 1 + again)
            self._add("all_gather", elements, self._made.products(f"{module}.{weight}") > 0)

    def _ends(self, B: int, tokens: int) -> None:
        """The head's input, and the exchange of its cross entropy; a classifier has all labels."""
        model, plan, passed = self._model, self._plan, HEAD in self._made.passed
        whole = B * tokens * model.hidden_size
        self._add("all_gather", whole, self._sequence)
        if model.num_labels:
            return
        self._add("reduce_scatter" if self._sequence else "all_reduce", whole, passed)
        rows = arch.padded_targets(B * tokens, target_count(self._config, B * tokens))
        chunk = arch.chunk_rows(-(-model.vocab_size // plan.tensor_parallel))
        full, rest = divmod(rows, chunk)
        for size, count in ((chunk, full), (rest, 1)):
            self._add("all_reduce", size, count, dtype=Precision.FP32)
            self._add("all_reduce", 2 * size, count, dtype=Precision.FP32)
        if self._config.finetune and self._config.finetune.label_smoothing:
            self._add("all_reduce", model.hidden_size, dtype=Precision.FP32)  # of the mean logit

    def _vectors(self) -> None:
        """Gradients of what every rank holds whole and meets with a part of the tokens or heads."""
        for row in arch.parameters(self._model):
            if row.name in self._made.learned and arch.needs_tp_grad_sum(
                row, sequence=self._sequence
            ):
                self._add("all_reduce", row.elements)


def data_collectives(config: RunConfig, plan: Plan) -> tuple[Collective, ...]:
    """Those of the ranks that share a batch, of one step.

    As DeepSpeed 0.19 moves them: gradients in fp32 (communication_data_type), weights as they are
    multiplied. Stages 0 and 1 reduce once a step, stages 2 and 3 every micro-batch; stage 3 gathers
    the weights for each forward and each backward. Buckets are taken to be full; BF16_Optimizer
    (stage 1) sends its one flat buffer, and the weights of stages 1 and 2 are gathered at once.
    """
    if plan.data_parallel == 1:
        return ()
    n = local_elements(config, plan.tensor_parallel, trained=True)
    every = local_elements(config, plan.tensor_parallel)
    times, stage = plan.accumulation_steps, plan.zero_stage
    bucket = plan.zero.reduce_bucket_size
    rows: list[Collective] = []
    if stage in (0, 1):
        whole = stage == 1 and plan.precision is Precision.BF16
        rows += _in_buckets("all_reduce", Precision.FP32, n, n if whole else bucket, 1)
    else:
        rows += _in_buckets("reduce_scatter", Precision.FP32, n, bucket, times)
    if stage in (1, 2):
        rows.append(Collective("data", "all_gather", plan.precision, n, 1))
    if stage == 3:
        # without prefetching each product's weights come alone, as many as a mean one has
        fetched = plan.zero.prefetch_bucket_size
        fetched = fetched or -(-every // len(arch.parameters(config.model)))
        rows += _in_buckets("all_gather", plan.precision, every, fetched, 2 * times)
    return tuple(rows)


def _in_buckets(
    kind: Kind, dtype: Precision, elements: int, bucket: int, times: int
) -> Iterator[Collective]:
    """So many elements in full buckets and one of what is left."""
    full, rest = divmod(elements, bucket)
    for size, count in ((bucket, full), (rest, 1)):
        if size and count:
            yield Collective("data", kind, dtype, size, count * times)
