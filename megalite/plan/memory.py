"""Bytes of one rank at the peak of a step.

Legend: n parameters on one tensor rank, d data-parallel ranks, B samples of a micro-batch, T tokens
of a sample, and the letters of `megalite.shapes`.
"""

from __future__ import annotations

from megalite import arch
from megalite.config import Precision, RunConfig, target_count
from megalite.plan.activations import MAPPED, activation_bytes, heap_bytes
from megalite.plan.devices import Kind
from megalite.plan.gradients import gradients, head_weight
from megalite.plan.optimizer import state_bytes
from megalite.plan.sizes import Plan
from megalite.plan.zero import local_elements

_LIVE_PARAMETERS = 1_000_000_000  # stage3_max_live_parameters of DeepSpeed 0.19
_SUB_GROUP = 1_000_000_000  # sub_group_size
# of a CPU's process: libraries at work, a group's connections, what measures a classifier; and
# holes in the heap as a share of activations
_LIBRARIES, _GROUP, _MEASURES, _HOLES = 85 << 20, 40 << 20, 70 << 20, 0.55


def host_bytes(config: RunConfig, plan: Plan, device: Kind) -> dict[str, int]:
    """Bytes that a rank keeps in its host's memory beside what `memory_bytes` totals.

    What an optimizer on the host takes, and the snapshot of a save in the background: the rank's
    share of fp32 weights and states.
    """
    n = local_elements(config, plan.tensor_parallel)
    share = -(-(4 * n + state_bytes(config, plan.tensor_parallel)) // plan.data_parallel)
    return {
        "offload_optimizer": plan.memory_bytes["optimizer"]
        if device == "cuda" and plan.zero.offloads_optimizer
        else 0,
        "checkpoint.background": share if config.checkpoint.background else 0,
    }


def memory_bytes(config: RunConfig, plan: Plan, device: Kind) -> dict[str, int]:
    """Bytes of one rank at the peak of a step, in the categories of the interface.

    The total can be less than the sum: gradients that a backward makes, and the buckets they are
    sent in, take the place of the activations and logits it has consumed. It is the device's: an
    optimizer that is kept on the host is not in it.
    """
    n = local_elements(config, plan.tensor_parallel)
    element = plan.precision.bytes
    parameters, optimizer, held, gradients = _states(config, plan, n, element)
    kept, work = activation_bytes(config, plan, element, device)
    logits = _logits(config, plan, element)
    trained = local_elements(config, plan.tensor_parallel, trained=True)
    buffers = _buffers(plan, trained, element)
    arriving = _arriving(plan, n, element)
    standing = _standing(plan)
    before = held + standing + kept + max(work + logits, arriving)
    peak = max(before, gradients + buffers)
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": kept + work,
        "logits": logits,
        "buffers": buffers + arriving,
        "total": parameters
        + peak
        + (0 if device == "cuda" and plan.zero.offloads_optimizer else optimizer),
    }


def _states(config: RunConfig, plan: Plan, n: int, element: int) -> tuple[int, int, int, int]:
    """Bytes of weights, of optimizer states, and of gradients: beside activations, and at most.

    What is frozen has neither states nor gradients.

    As DeepSpeed 0.19.8 holds them, checked against its allocations: runtime/bf16_optimizer.py
    for bf16 at stage 1, else runtime/zero/stage_1_and_2.py and stage3.py. Masters are fp32,
    also of fp32 weights. A micro-batch but the first finds the gradients of those before it.
    """
    stage, d = plan.zero_stage, plan.data_parallel
    later = plan.accumulation_steps > 1
    every, n = n, local_elements(config, plan.tensor_parallel, trained=True)
    part, parts = -(-n // d), -(-every // d)
    moments = state_bytes(config, plan.tensor_parallel)
    if stage == 0:
        return element * every, moments, element * n * later, element * n
    optimizer = 4 * part + -(-moments // d)
    if stage == 1 and plan.precision == Precision.BF16:  # one flat fp32 buffer, made at the start
        return element * every, optimizer, 4 * n, 4 * n
    if stage == 1:  # each gradient in fp32; fp16's own, or the flat copy the step is made from
        extra = 4 * part if element == 4 else max(4 * part, 2 * n)
        return element * every, optimizer, 4 * n * later, 4 * n + extra
    if stage == 2:  # the partition's sum; in fp32 also the flat copy the step is made from
        return element * every, optimizer, 4 * part * later, (8 if element == 4 else 4) * part
    copied = 4 * min(part, _SUB_GROUP)
    whole = _gathered(plan, every, element)
    return element * parts + whole, optimizer, 4 * part, 4 * part + copied


def _buffers(plan: Plan, n: int, element: int) -> int:
    """Bytes of the buckets that gradients are sent in."""
    bucket = plan.zero.reduce_bucket_size
    if plan.zero_stage == 0:
        return element * min(n, bucket)
    if plan.zero_stage == 1:
        return 0 if plan.precision == Precision.BF16 else 4 * bucket
    staging = element * (2 if plan.zero.overlap_comm else 1)
    return (staging + (4 if element == 2 else 0)) * bucket  # 16-bit gradients are sent in fp32


def _standing(plan: Plan) -> int:
    """Bytes of the buckets that stand beside activations, in fp32 as gradients are sent.

    ZeRO 3 makes its bucket once; ZeRO 1, where it has one, in the first of several micro-batches,
    for the last.
    """
    bucket = plan.zero.reduce_bucket_size
    first = (
        plan.zero_stage == 1 and plan.precision != Precision.BF16 and plan.accumulation_steps > 1
    )
    return 4 * bucket * (plan.zero_stage == 3 or first)


def _arriving(plan: Plan, n: int, element: int) -> int:
    """Bytes that ZeRO 3's gathers arrive in: each is kept until its last weight is copied out.

    One is being used while the next is fetched.
    """
    if plan.zero_stage != 3 or plan.data_parallel == 1:
        return 0
    return element * min(n, 2 * plan.zero.prefetch_bucket_size)


def process_bytes(config: RunConfig, plan: Plan) -> int:
    """Return the bytes that a rank on a CPU adds to its process at the peak of a run.

    The C library has small pieces in its heap, which keeps the most that it ever held, with holes:
    a freed tensor leaves room that a tensor of its own size, aligned, does not fit into. Large
    pieces come from the system and go back to it, so that of two moments the larger counts.
    Libraries that a run loads at work come on top. Holes are a share of what blocks keep, measured
    by `benchmarks/plan.py --cpu` under the heap that `megalite.env.restart_with_heap` sets.
    """
    n, element = local_elements(config, plan.tensor_parallel), plan.precision.bytes
    trained = local_elements(config, plan.tensor_parallel, trained=True)
    weights, optimizer, held, gradients = _states(config, plan, n, element)
    copied = _flat_copy(config, plan, trained, gradients)
    buffers, arriving = (
        _buffers(plan, trained, element),
        _arriving(plan, n, element),
    )
    _, work = activation_bytes(config, plan, element, "cpu")
    chunk, made = _logit_parts(config, plan, element)
    small, large = heap_bytes(config, plan, element)
    stays, pieces = weights + optimizer, [made, held, _standing(plan)]
    # ZeRO 1 and 2 flatten a bucket once more to send it (allreduce_bucket); ZeRO 1 keeps the bucket
    # beside the copy that the step is made from, the others do not
    again = min(element * trained, buffers) * (plan.zero_stage in (1, 2) and plan.data_parallel > 1)
    sent = buffers + max(again, copied) if plan.zero_stage == 1 else max(buffers + again, copied)
    if plan.zero_stage == 3:
        whole = _gathered(plan, n, element)
        stays += held + _standing(plan) - whole
        pieces = [made, whole]
        # one gather and one bucket for everything both stand until the end of the backward
        alone = arriving == element * n and trained <= plan.zero.reduce_bucket_size
        sent = max(sent, arriving + buffers * alone)
    before = sum(size for size in pieces if size < MAPPED or plan.zero_stage == 3)
    mapped = large + sum(pieces) - before
    logits = chunk - min(work, chunk)  # what they take beyond the work that follows them
    if chunk < MAPPED:
        before += logits
    else:
        mapped += logits
    # gradients find no room among the activations that a backward frees: both add up
    heap = small + round(_HOLES * small) + before + gradients - copied
    sent = max(mapped, sent if sent >= MAPPED else 0)
    libraries = _LIBRARIES + _GROUP * (plan.world_size > 1)
    libraries += _MEASURES * bool(config.model.num_labels)
    return libraries + stays + heap + sent


def _flat_copy(config: RunConfig, plan: Plan, trained: int, gradients: int) -> int:
    """Return bytes of the one fp32 piece of gradients that a step is made from."""
    if plan.zero_stage == 0:
        return 0
    if plan.zero_stage == 1 and plan.precision == Precision.BF16:
        return gradients
    made = 4 * (trained if plan.zero_stage == 1 else -(-trained // plan.data_parallel))
    return gradients - made


def _gathered(plan: Plan, n: int, element: int) -> int:
    return 0 if plan.data_parallel == 1 else element * min(n, _LIVE_PARAMETERS)


def _logits(config: RunConfig, plan: Plan, element: int) -> int:
    return sum(_logit_parts(config, plan, element))


def _logit_parts(config: RunConfig, plan: Plan, element: int) -> tuple[int, int]:
    """Bytes of the fused head and loss: a chunk's logits, and the gradients it gives."""
    model = config.model
    if model.num_labels:  # a sample's scores, those in fp32, and their gradient
        return (element + 8) * plan.micro_batch_size * model.num_labels, 0
    vocabulary = -(-model.vocab_size // plan.tensor_parallel)
    *_, length = arch.lengths(config).values()
    places = plan.micro_batch_size * length
    rows = arch.padded_targets(places, target_count(config, places))
    # turned into their gradient in place; not compiled, 16-bit logits are widened first
    of_logit = element if element == 4 or config.training.compile else element + 4
    chunk = of_logit * min(arch.chunk_rows(vocabulary), rows) * vocabulary
    learns = head_weight(model) in gradients(model, config.finetune).learned
    return chunk, (4 * vocabulary * learns + element * rows) * model.hidden_size
