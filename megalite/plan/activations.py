"""Activation memory of one rank: the bytes that blocks save for the backward.

They are sums of what the parts state. The tests compare them, tensor by tensor, with what a forward
on a CPU saves.
"""

from __future__ import annotations

from megalite.arch.part import Cost, Workload
from megalite.config import RunConfig
from megalite.plan.devices import Kind
from megalite.plan.sizes import Plan
from megalite.plan.workloads import run_costs

# glibc maps a request of at least this size outside the process's heap. `megalite.env` sets this
# threshold; it is DEFAULT_MMAP_THRESHOLD_MAX of malloc/malloc.c.
MMAP_THRESHOLD = 32 << 20


def activation_bytes(config: RunConfig, plan: Plan, device: Kind) -> tuple[int, int]:
    """Return the bytes saved for the backward, and the working memory of one block's backward."""
    saved, work = 0, 0
    mode = config.training.activation_checkpointing
    for stack in run_costs(config, plan, device).stacks:
        load = stack.load
        ends = (stack.entry.saved, stack.norm.saved)
        saved += sum(load.batch_tokens * part.values + part.mask for part in ends)
        block_input = load.element * load.batch_tokens * load.stream_width(config.model)
        for layer, count in stack.kinds:
            whole = _whole_block(layer, load)
            outputs = load.batch_tokens * sum(part.saved.outputs for part in layer)
            memory = sum(part.saved.memory for part in layer)
            by_mode = {
                "none": whole,
                "selective": block_input + outputs + memory,
                "full": block_input,
            }
            saved += count * by_mode[mode]
            gradients = load.batch_tokens * sum(part.saved.work for part in layer)
            gradients += sum(part.saved.scores for part in layer)
            work = max(work, gradients + (whole if mode != "none" else 0))
    return saved, work


def _whole_block(layer: tuple[Cost, ...], load: Workload) -> int:
    """Return the bytes that a block saves without recomputation."""
    parts = [part.saved for part in layer]
    per_token = round(sum(part.norm for part in parts)) + sum(part.values for part in parts)
    return load.batch_tokens * per_token + sum(p.memory + p.mask + p.scores for p in parts)


def heap_bytes(config: RunConfig, plan: Plan) -> tuple[int, int]:
    """Return the bytes of a CPU's activations in the heap, and in tensors mapped outside it.

    Masks count as mapped, because they do not fragment the heap. Attention without a fused kernel
    leaves two more tensors of the scores' size in the heap: the product and its gradient.
    """
    small = sum(activation_bytes(config, plan, "cpu"))
    mapped = 0
    if config.training.activation_checkpointing != "none":
        return small, 0
    for stack in run_costs(config, plan, "cpu").stacks:
        parts = [(part.saved, count) for layer, count in stack.kinds for part in layer]
        for part, count in parts:
            sizes = [stack.load.batch_tokens * size for size in part.large]
            mapped += count * (part.mask + sum(size for size in sizes if size >= MMAP_THRESHOLD))
        small += sum(count * part.scores for part, count in parts) * 2 // 3
    return small - mapped, mapped
