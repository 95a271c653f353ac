"""Communication: every collective of a step, by group, kind and size.

Collectives of tensor-parallel ranks (`megalite.parallel`) are exact: the dry run counts the same
calls. Collectives of data-parallel ranks are DeepSpeed's. They are estimated from its ZeRO stages,
in the fewest calls that its buckets allow, and not checked call by call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megalite import arch
from megalite.arch.part import MessageKind as Kind
from megalite.arch.part import chunk_sizes
from megalite.config import Precision, RunConfig
from megalite.plan.gradients import gradients
from megalite.plan.sizes import Plan
from megalite.plan.workloads import run_costs
from megalite.plan.zero import local_elements


@dataclass(frozen=True, order=True)
class Collective:
    """Identical collective calls of a group in one step.

    Attributes:
        elements: size of the whole tensor: after an all_gather, before other kinds.
        count: number of calls in a step.
    """

    group: Literal["tensor", "data"]
    kind: Kind
    dtype: Precision
    elements: int
    count: int

    @property
    def bytes(self) -> int:
        """Return the bytes of the whole tensors in all calls."""
        return self.count * self.elements * self.dtype.bytes

    def sent_bytes(self, ranks: int) -> float:
        """Return the bytes that a rank of a ring sends.

        A rank sends all but its part, and twice that in an all_reduce (Patarasuk & Yuan 2009).
        """
        times = 2 if self.kind == "all_reduce" else 1
        return times * self.bytes * (ranks - 1) / ranks


def tensor_collectives(config: RunConfig, plan: Plan) -> tuple[Collective, ...]:
    """Return the calls of tensor-parallel ranks in one step.

    Parts state their calls. Gradients of replicated parameters are summed as well, if each rank
    computes them from different tokens or heads.
    """
    if plan.mesh.tensor == 1:
        return ()
    calls: Counter[tuple[Kind, Precision, int]] = Counter()
    costs = run_costs(config, plan)
    for cost, count in (*costs.kinds, *((end, 1) for end in costs.ends)):
        for message in cost.messages:
            dtype = Precision.FP32 if message.fp32 else plan.precision
            calls[message.kind, dtype, message.elements] += count * message.count
    trained = gradients(config.model, config.finetune).trained
    for spec in arch.parameters(config.model):
        summed = arch.needs_tp_grad_sum(spec, sequence=config.parallel.sequence)
        if summed and spec.name in trained:
            calls["all_reduce", plan.precision, spec.elements] += 1
    return tuple(
        sorted(
            Collective("tensor", kind, dtype, elements, count * plan.accumulation_steps)
            for (kind, dtype, elements), count in calls.items()
        )
    )


def data_collectives(config: RunConfig, plan: Plan) -> tuple[Collective, ...]:
    """Return the calls of data-parallel ranks in one step, as DeepSpeed 0.19 makes them.

    Gradients are sent in fp32 (communication_data_type), weights in the run's precision. Stages 0
    and 1 reduce once per step, stages 2 and 3 in every micro-batch. Stage 3 gathers the weights for
    each forward and each backward (deepspeed/runtime/zero/partitioned_param_coordinator.py).
    Buckets are assumed to be full. Stage 1 in bf16 sends one flat buffer
    (deepspeed/runtime/bf16_optimizer.py). Stages 1 and 2 gather all weights at once (step in
    deepspeed/runtime/zero/stage_1_and_2.py).
    """
    if plan.data_parallel == 1:
        return ()
    n = local_elements(config, plan.mesh.tensor, trained=True)
    every = local_elements(config, plan.mesh.tensor)
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
        # without prefetching each parameter is fetched separately; assume the mean size
        fetched = plan.zero.prefetch_bucket_size
        fetched = fetched or -(-every // len(arch.parameters(config.model)))
        rows += _in_buckets("all_gather", plan.precision, every, fetched, 2 * times)
    return tuple(rows)


def _in_buckets(
    kind: Kind, dtype: Precision, elements: int, bucket: int, times: int
) -> Iterator[Collective]:
    """Yield the calls that send `elements` in full buckets and one bucket for the rest."""
    for size, count in chunk_sizes(elements, bucket):
        yield Collective("data", kind, dtype, size, count * times)
