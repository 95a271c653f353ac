"""Bytes that the blocks of a model keep for the backward on one rank.

They are sums over what the parts state. The tests check them against what a forward on a CPU keeps,
tensor by tensor.
"""

from __future__ import annotations

from megalite.arch.part import Cost, Workload
from megalite.config import RunConfig
from megalite.plan.devices import Kind
from megalite.plan.sizes import Plan
from megalite.plan.workloads import run_costs

# Bytes from which glibc serves a request from the system, not from the process's heap: the
# mmap_threshold that `megalite.env` sets, which is DEFAULT_MMAP_THRESHOLD_MAX of malloc/malloc.c.
MMAP_THRESHOLD = 32 << 20


def activation_bytes(config: RunConfig, plan: Plan, device: Kind) -> tuple[int, int]:
    """Return the bytes kept for the backward, and those of work in the block it is at."""
    kept, work = 0, 0
    mode = config.training.activation_checkpointing
    for stack in run_costs(config, plan, device).stacks:
        load = stack.load
        ends = (stack.entry.saved, stack.norm.saved)
        kept += sum(load.batch_tokens * part.values + part.mask for part in ends)
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
            kept += count * by_mode[mode]
            gradients = load.batch_tokens * sum(part.saved.work for part in layer)
            gradients += sum(part.saved.scores for part in layer)
            work = max(work, gradients + (whole if mode != "none" else 0))
    return kept, work


def _whole_block(layer: tuple[Cost, ...], load: Workload) -> int:
    """Return the bytes that a block keeps without recomputation."""
    parts = [part.saved for part in layer]
    each = round(sum(part.norm for part in parts)) + sum(part.values for part in parts)
    return load.batch_tokens * each + sum(p.memory + p.mask + p.scores for p in parts)


def heap_bytes(config: RunConfig, plan: Plan) -> tuple[int, int]:
    """Return the bytes of activations on a CPU in pieces of the heap, and in larger ones.

    Masks count as larger pieces, because they leave no holes. Scores that are computed one by one
    leave two more pieces of their size in the heap: the product itself, and its gradient.
    """
    small = sum(activation_bytes(config, plan, "cpu"))
    large = 0
    if config.training.activation_checkpointing != "none":
        return small, 0
    for stack in run_costs(config, plan, "cpu").stacks:
        parts = [(part.saved, count) for layer, count in stack.kinds for part in layer]
        for part, count in parts:
            pieces = [stack.load.batch_tokens * piece for piece in part.large]
            large += count * (part.mask + sum(piece for piece in pieces if piece >= MMAP_THRESHOLD))
        small += sum(count * part.scores for part, count in parts) * 2 // 3
    return small - large, large
