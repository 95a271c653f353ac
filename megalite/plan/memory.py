"""Peak memory of one rank during a step, in bytes.

n parameters on one tensor rank   d data-parallel ranks
"""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config import Precision, RunConfig
from megalite.plan.activations import activation_bytes
from megalite.plan.devices import Kind
from megalite.plan.optimizer import state_bytes
from megalite.plan.sizes import Plan
from megalite.plan.workloads import run_costs
from megalite.plan.zero import local_elements

# Defaults of DeepSpeed 0.19 (class DeepSpeedZeroConfig in deepspeed/runtime/zero/config.py):
_LIVE_PARAMETERS = 1_000_000_000  # stage3_max_live_parameters: gathered weights at a time
_SUB_GROUP = 1_000_000_000  # sub_group_size: parameters that stage 3 updates at a time


@dataclass(frozen=True)
class States:
    """Bytes of a rank's weights, optimizer states and gradients.

    Attributes:
        resident_gradients: gradients that exist together with activations.
        gradients: gradients at their peak.
    """

    weights: int
    optimizer: int
    resident_gradients: int
    gradients: int


def host_bytes(config: RunConfig, plan: Plan, device: Kind) -> dict[str, int]:
    """Return the bytes of a rank in host memory, in addition to `memory_bytes`.

    These are offloaded optimizer states, and the snapshot of a background save: the rank's share of
    fp32 weights and states.
    """
    n = local_elements(config, plan.mesh.tensor)
    share = -(-(4 * n + state_bytes(config, plan.mesh.tensor)) // plan.data_parallel)
    return {
        "offload_optimizer": plan.memory_bytes["optimizer"]
        if device == "cuda" and plan.zero.offloads_optimizer
        else 0,
        "checkpoint.background": share if config.checkpoint.background else 0,
    }


def memory_bytes(config: RunConfig, plan: Plan, device: Kind) -> dict[str, int]:
    """Return the peak bytes of one rank during a step, by category.

    The total can be less than the sum: during the backward, gradients and their buckets reuse the
    memory of consumed activations and logits. The total excludes an offloaded optimizer.
    """
    states = state_memory(config, plan)
    saved, work = activation_bytes(config, plan, device)
    logits = run_costs(config, plan, device).head.logits
    buffers, prefetch = bucket_bytes(config, plan), prefetch_bytes(config, plan)
    backward_start = states.resident_gradients + resident_buckets(plan) + saved
    backward_start += max(work + logits.chunk + logits.gradients, prefetch)
    total = states.weights + max(backward_start, states.gradients + buffers)
    if device == "cpu" or not plan.zero.offloads_optimizer:
        total += states.optimizer
    return {
        "parameters": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "activations": saved + work,
        "logits": logits.chunk + logits.gradients,
        "buffers": buffers + prefetch,
        "total": total,
    }


def state_memory(config: RunConfig, plan: Plan) -> States:
    """Return the bytes of weights, optimizer states and gradients.

    Frozen parameters have neither states nor gradients. Master weights are fp32, even if the
    weights are fp32. Gradients accumulate over micro-batches. The sizes were checked against the
    allocations of DeepSpeed 0.19.8: deepspeed/runtime/bf16_optimizer.py for bf16 at stage 1, else
    deepspeed/runtime/zero/stage_1_and_2.py and stage3.py.
    """
    stage = plan.zero_stage
    d = plan.data_parallel
    element = plan.precision.bytes
    is_accumulated = plan.accumulation_steps > 1
    every = local_elements(config, plan.mesh.tensor)
    n = local_elements(config, plan.mesh.tensor, trained=True)
    partition = -(-n // d)
    moments = state_bytes(config, plan.mesh.tensor)
    if stage == 0:
        return States(element * every, moments, element * n * is_accumulated, element * n)
    optimizer = 4 * partition + -(-moments // d)
    if stage == 3:
        weights = element * -(-every // d) + gathered_bytes(config, plan)
        sub_group = 4 * min(partition, _SUB_GROUP)  # flat copy for the update
        return States(weights, optimizer, 4 * partition, 4 * partition + sub_group)
    if stage == 2:  # the partition's sum; in fp32 also a flat copy for the update
        resident = 4 * partition * is_accumulated
        per_element = 8 if plan.precision is Precision.FP32 else 4
        return States(element * every, optimizer, resident, per_element * partition)
    if plan.precision is Precision.BF16:  # one flat fp32 buffer, allocated at the start
        return States(element * every, optimizer, 4 * n, 4 * n)
    # fp32 gradients, and a flat copy for the update; in fp16 the fp16 gradients, if larger
    is_fp32 = plan.precision is Precision.FP32
    copy = 4 * partition if is_fp32 else max(4 * partition, 2 * n)
    return States(element * every, optimizer, 4 * n * is_accumulated, 4 * n + copy)


def bucket_bytes(config: RunConfig, plan: Plan) -> int:
    """Return the bytes of the buckets in which gradients are sent."""
    bucket, element = plan.zero.reduce_bucket_size, plan.precision.bytes
    if plan.zero_stage == 0:
        return element * min(local_elements(config, plan.mesh.tensor, trained=True), bucket)
    if plan.zero_stage == 1:
        return 0 if plan.precision is Precision.BF16 else 4 * bucket
    # ipg_buffer of DeepSpeed's stages 2 and 3: two with overlap_comm
    staging = element * (2 if plan.zero.overlap_comm else 1)
    in_fp32 = 0 if plan.precision is Precision.FP32 else 4  # 16-bit gradients are sent in fp32
    return (staging + in_fp32) * bucket


def resident_buckets(plan: Plan) -> int:
    """Return the bytes of the fp32 buckets that exist together with activations.

    ZeRO 3 allocates its bucket once. ZeRO 1 in fp32 or fp16 allocates it in the first of several
    micro-batches and frees it after the last.
    """
    accumulates = (
        plan.zero_stage == 1
        and plan.precision is not Precision.BF16
        and plan.accumulation_steps > 1
    )
    return 4 * plan.zero.reduce_bucket_size * (plan.zero_stage == 3 or accumulates)


def prefetch_bytes(config: RunConfig, plan: Plan) -> int:
    """Return the bytes of the gathers that ZeRO 3 has in flight.

    A gather's buffer is freed once its last weight is copied out, and the next gather is already
    running: there are two.
    """
    if plan.zero_stage != 3 or plan.data_parallel == 1:
        return 0
    every = local_elements(config, plan.mesh.tensor)
    return plan.precision.bytes * min(every, 2 * plan.zero.prefetch_bucket_size)


def gathered_bytes(config: RunConfig, plan: Plan) -> int:
    """Return the bytes of the weights that ZeRO 3 has gathered at its peak."""
    if plan.data_parallel == 1:
        return 0
    every = local_elements(config, plan.mesh.tensor)
    return plan.precision.bytes * min(every, _LIVE_PARAMETERS)
