"""Memory that a run adds to a CPU process: tensors, heap fragmentation, libraries."""

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

# Measured by `benchmarks/plan.py --cpu`, with the heap of `megalite.env.restart_with_heap`:
_LIBRARIES = 85 << 20  # libraries that load while a run trains
_GROUP = 40 << 20  # connections of a group of ranks
_CLASSIFIER_METRICS = 70 << 20  # libraries that compute a classifier's metrics
FRAGMENTATION = 0.55  # of the heap, as a share of the activations in it


def process_bytes(config: RunConfig, plan: Plan) -> int:
    """Return the bytes that a run adds to a CPU process at its peak.

    The C library keeps small tensors in its heap, which fragments and never shrinks. A freed tensor
    leaves a hole that an aligned tensor of the same size does not fit. Large tensors are mapped and
    unmapped, so of two moments only the larger counts.
    """
    states = state_memory(config, plan)
    copy = _flat_copy(config, plan, states)
    logits = run_costs(config, plan, "cpu").head.logits
    small, mapped = heap_bytes(config, plan)
    resident = states.weights + states.optimizer
    sizes = [logits.gradients]
    if plan.zero_stage == 3:
        gathered = gathered_bytes(config, plan)
        resident += states.resident_gradients + resident_buckets(plan) - gathered
        sizes.append(gathered)
    else:
        sizes += [states.resident_gradients, resident_buckets(plan)]
    in_heap = sum(size for size in sizes if size < MMAP_THRESHOLD or plan.zero_stage == 3)
    mapped += sum(sizes) - in_heap
    _, work = activation_bytes(config, plan, "cpu")
    beyond_work = max(0, logits.chunk - work)  # later working memory reuses the rest
    if logits.chunk < MMAP_THRESHOLD:
        in_heap += beyond_work
    else:
        mapped += beyond_work
    # gradients do not fit the holes that freed activations leave: both count
    heap = small + round(FRAGMENTATION * small) + in_heap + states.gradients - copy
    sent = _sent_bytes(config, plan, copy)
    mapped = max(mapped, sent if sent >= MMAP_THRESHOLD else 0)
    libraries = _LIBRARIES + _GROUP * (plan.world_size > 1)
    libraries += _CLASSIFIER_METRICS * bool(config.model.num_labels)
    return libraries + resident + heap + mapped


def _sent_bytes(config: RunConfig, plan: Plan, copy: int) -> int:
    """Return the peak bytes of buffers while gradients are sent and the update is computed.

    ZeRO 1 and 2 flatten a bucket again to send it (allreduce_bucket in
    deepspeed/runtime/zero/stage_1_and_2.py). Only ZeRO 1 keeps the bucket together with the flat
    copy for the update.
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
    # if one gather and one bucket hold everything, both exist until the backward ends
    every = plan.precision.bytes * local_elements(config, plan.mesh.tensor)
    is_single = prefetch == every and trained <= plan.zero.reduce_bucket_size
    return max(sent, prefetch + buckets * is_single)


def _flat_copy(config: RunConfig, plan: Plan, states: States) -> int:
    """Return the bytes of the flat fp32 copy of gradients for the update."""
    if plan.zero_stage == 0:
        return 0
    if plan.zero_stage == 1 and plan.precision is Precision.BF16:
        return states.gradients
    trained = local_elements(config, plan.mesh.tensor, trained=True)
    parts = 1 if plan.zero_stage == 1 else plan.data_parallel
    return states.gradients - 4 * -(-trained // parts)
