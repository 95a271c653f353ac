"""Where DeepSpeed keeps the fp32 masters of parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from megalite.parallel import Grid


def fragments(
    zero: Any, stage: int, grid: Grid
) -> dict[int, list[tuple[nn.Parameter, tuple[int, int, int]]]]:
    """What this rank's flat masters of a DeepSpeed optimizer hold of its parameters.

    Returns:
        by the `id` of a master, for each parameter of its group: (start, length) of the flattened
        parameter, and where that begins in the master. As DeepSpeed 0.19.8 lays them out
        (runtime/zero/stage3.py; utils/tensor_fragment.py for the stages below).
    """
    found: dict[int, list[tuple[nn.Parameter, tuple[int, int, int]]]] = {}
    if stage == 3:
        for number, group in enumerate(zero.fp16_groups):
            places = []
            for parameter in group:
                _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                start = grid.at.zero_rank * length  # of equal parts, the last ones padded
                length = max(0, min(length, parameter.ds_numel - start))
                places.append((parameter, (start, length, offset)))
            found[id(zero.fp32_partitioned_groups_flat[number])] = places
        return found
    groups = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups
    for group, inner in zip(groups, zero.optimizer.param_groups, strict=True):
        (master,) = inner["params"]
        found[id(master)] = [(parameter, fragment(parameter)) for parameter in group]
    return found


def fragment(parameter: Any) -> tuple[int, int, int]:
    """(start, length, place in the master) of what this rank has of a parameter below ZeRO-3."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:  # other ranks have it, or it is frozen
        return 0, 0, 0
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return int(low.start), int(low.numel), int(high.start)
