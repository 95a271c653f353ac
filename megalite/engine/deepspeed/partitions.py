"""The partitions of fp32 master weights in DeepSpeed 0.19.8."""

from __future__ import annotations

from typing import Any

from torch import nn

from megalite import arch
from megalite.config import ModelConfig
from megalite.optim import Fragment
from megalite.parallel import Grid

# first element and length of a part of a flattened parameter, and its offset in the master tensor
Partition = tuple[int, int, int]


def zero_partitions(
    zero: Any, stage: int, grid: Grid
) -> dict[int, list[tuple[nn.Parameter, Partition]]]:
    """Return the parts of parameters that each of this rank's flat master tensors contains.

    Args:
        zero: DeepSpeed's optimizer.
        stage: 1, 2 or 3.
    Returns:
        the parameters and their parts, by the `id` of the master tensor.
    """
    if stage == 3:
        return _stage_3_partitions(zero, grid)
    partitions = {}
    # bit16_groups: runtime/zero/stage_1_and_2.py; bf16_groups: runtime/bf16_optimizer.py
    groups = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups
    for group, inner in zip(groups, zero.optimizer.param_groups, strict=True):
        (master,) = inner["params"]
        partitions[id(master)] = [(p, local_partition(p)) for p in group]
    return partitions


def _stage_3_partitions(zero: Any, grid: Grid) -> dict[int, list[tuple[nn.Parameter, Partition]]]:
    """Return `zero_partitions` of stage 3: equal parts, the last padded (zero/stage3.py)."""
    partitions = {}
    for number, group in enumerate(zero.fp16_groups):
        parts = []
        for parameter in group:
            _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            start = grid.at.zero_rank * length
            length = max(0, min(length, parameter.ds_numel - start))
            parts.append((parameter, (start, length, offset)))
        partitions[id(zero.fp32_partitioned_groups_flat[number])] = parts
    return partitions


def name_partitions(
    partitions: dict[int, list[tuple[nn.Parameter, Partition]]],
    model: nn.Module,
    config: ModelConfig,
) -> dict[int, list[Fragment]]:
    """Convert `zero_partitions` to Muon's fragments."""
    specs = {spec.name: spec for spec in arch.parameters(config)}
    named = {id(parameter): specs[name] for name, parameter in model.named_parameters()}
    return {
        master: [Fragment(named[id(parameter)], *part) for parameter, part in parts]
        for master, parts in partitions.items()
    }


def local_partition(parameter: Any) -> Partition:
    """Return the part of a parameter that this rank has under ZeRO-1 and ZeRO-2.

    It is empty if the parameter is frozen or lies wholly on other ranks. `_hp_mapping` comes from
    utils/mixed_precision_linkage.py, its addresses from utils/tensor_fragment.py.
    """
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return 0, 0, 0
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return int(low.start), int(low.numel), int(high.start)
