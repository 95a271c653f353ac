"""Bytes that a rank on a CPU adds to its process: tensors, holes of the heap, libraries."""

from __future__ import annotations

from megalite.config import Precision, RunConfig
from megalite.plan.activations import MMAP_THRESHOLD, activation_bytes, heap_bytes
from megalite.plan.memory import (
    States,
    bucket_bytes,
    gathered_bytes,
    prefetch_bytes,
    resident_buckets,
    state_memory,
)
from megalite.plan.sizes import Plan
from megalite.plan.workloads import run_costs
from megalite.plan.zero import local_elements

# Measured by `benchmarks/plan.py --cpu`, under the heap that `megalite.env.restart_with_heap` sets:
_LIBRARIES = 85 << 20  # libraries that a run loads at work
_GROUP = 40 << 20  # connections of a group of ranks
_MEASURES = 70 << 20  # libraries that measure a classifier
FRAGMENTATION = 0.55  # holes in the heap, as a share of activations


def process_bytes(config: RunConfig, plan: Plan) -> int:
    """Return the bytes that a rank on a CPU adds to its process at the peak of a run.

    The C library keeps small pieces in its heap, which never shrinks and has holes: a freed tensor
    leaves room that a tensor of its own size, aligned, does not fit into. Large pieces come from
    the system and return to it, so that the larger of two moments counts.
    """
    states = state_memory(config, plan)
    copy = _flat_copy(config, plan, states)
    logits = run_costs(config, plan, "cpu").head.logits
    small, mapped = heap_bytes(config, plan)
    resident = states.weights + states.optimizer
    pieces = [logits.gradients]
    if plan.zero_stage == 3:
        gathered = gathered_bytes(config, plan)
        resident += states.resident_gradients + resident_buckets(plan) - gathered
        pieces.append(gathered)
    else:
        pieces += [states.resident_gradients, resident_buckets(plan)]
    in_heap = sum(size for size in pieces if size < MMAP_THRESHOLD or plan.zero_stage == 3)
    mapped += sum(pieces) - in_heap
    _, work = activation_bytes(config, plan, "cpu")
    beyond_work = max(0, logits.chunk - work)  # the work that follows takes the place of the rest
    if logits.chunk < MMAP_THRESHOLD:
        in_heap += beyond_work
    else:
        mapped += beyond_work
    # gradients find no room among the activations that a backward frees: both add up
    heap = small + round(FRAGMENTATION * small) + in_heap + states.gradients - copy
    sent = _sent_bytes(config, plan, copy)
    mapped = max(mapped, sent if sent >= MMAP_THRESHOLD else 0)
    libraries = _LIBRARIES + _GROUP * (plan.world_size > 1)
    libraries += _MEASURES * bool(config.model.num_labels)
    return libraries + resident + heap + mapped


def _sent_bytes(config: RunConfig, plan: Plan, copy: int) -> int:
    """Return the bytes that stand at once while gradients are sent and the step is made.

    ZeRO 1 and 2 flatten a bucket once more to send it (allreduce_bucket in
    deepspeed/runtime/zero/stage_1_and_2.py). ZeRO 1 keeps the bucket next to the copy that the step
    is made from; the others do not.
    """
    buckets, prefetch = bucket_bytes(config, plan), prefetch_bytes(config, plan)
    trained = local_elements(config, plan.mesh.tensor, trained=True)
    flattens = plan.zero_stage in (1, 2) and plan.data_parallel > 1
    flat = min(plan.precision.bytes * trained, buckets) * flattens
    if plan.zero_stage == 1:
        return buckets + max(flat, copy)
    sent = max(buckets + flat, copy)
    if plan.zero_stage != 3:
        return sent
    # a single gather and a single bucket for everything both stand until the backward ends
    every = plan.precision.bytes * local_elements(config, plan.mesh.tensor)
    is_single = prefetch == every and trained <= plan.zero.reduce_bucket_size
    return max(sent, prefetch + buckets * is_single)


def _flat_copy(config: RunConfig, plan: Plan, states: States) -> int:
    """Return the bytes of the single fp32 piece of gradients that a step is made from."""
    if plan.zero_stage == 0:
        return 0
    if plan.zero_stage == 1 and plan.precision is Precision.BF16:
        return states.gradients
    trained = local_elements(config, plan.mesh.tensor, trained=True)
    parts = 1 if plan.zero_stage == 1 else plan.data_parallel
    return states.gradients - 4 * -(-trained // parts)
