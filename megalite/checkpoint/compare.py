"""Comparison of an engine's states after a load with the hashes in the checkpoint's manifest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite import arch
from megalite.checkpoint.owners import owned_parameters, read_canonical, value_hash
from megalite.checkpoint.stored import StoredCheckpoint
from megalite.config import ModelConfig
from megalite.engine import Engine
from megalite.formats import checkpoint as disk
from megalite.parallel import Grid

_MAX_PENDING = 4  # tensors that are being hashed at a time


@dataclass(frozen=True)
class LoadTarget:
    """An engine, and the states of it that a load sets.

    Attributes:
        model: the engine's model section.
        states: function that returns the names of a parameter's states to set.
    """

    engine: Engine
    model: ModelConfig
    states: Callable[[arch.ParameterSpec], Sequence[str]]
    grid: Grid


def compare_states(target: LoadTarget, source: StoredCheckpoint) -> list[str]:
    """Read all states from the engine and compare their hashes with the manifest's.

    Threads hash while the next states are read.

    Returns:
        descriptions of the states that differ, on the rank that owns them.
    """
    differing = []
    hashing: deque[tuple[str, Future[bool]]] = deque()
    engine, grid = target.engine, target.grid

    def compare() -> None:
        description, same = hashing.popleft()
        if not same.result():
            differing.append(description)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for owner in owned_parameters(engine, target.model, grid):
            # A frozen weight has no fp32 master: the engine holds it rounded to the model's type.
            dtype = torch.float32 if owner.parameter.requires_grad else owner.parameter.dtype
            for state in target.states(owner.row):
                for name, value in read_canonical(engine, owner, state, grid).items():
                    same = pool.submit(_is_written, value, dtype, name, state, source)
                    hashing.append((f"{state} of {name}", same))
                    if len(hashing) > _MAX_PENDING:
                        compare()
        while hashing:
            compare()
    return differing


def _is_written(
    value: Tensor, dtype: torch.dtype, name: str, state: str, source: StoredCheckpoint
) -> bool:
    """Return whether a tensor of the engine equals the one that was written, rounded to `dtype`.

    DeepSpeed assembles a parameter by adding its parts to zeros (`safe_get_full_fp32_param` in
    deepspeed/utils/tensor_fragment.py), which turns -0 into 0. So if the hashes differ, the tensor
    is read again, checked against its hash, and compared by value.
    """
    entry = source.manifest.tensors[name].states.get(state)
    if entry is None:
        return False  # the load has reported it
    if value_hash(value) == entry.sha256:
        return True
    stored = torch.empty(value.shape)
    box = tuple(slice(0, size) for size in value.shape)
    try:
        disk.read_tensor(source.folder / entry.file, name, stored.numpy(), box)
    except (OSError, ValueError, KeyError):
        return False
    rounded = stored.to(dtype).float()
    return value_hash(stored) == entry.sha256 and torch.equal(rounded, value)
