"""Proof of a load: the engine holds what the manifest says was written."""

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

_PENDING = 4  # most tensors whose hashes are being made


@dataclass(frozen=True)
class LoadTarget:
    """The states of an engine that a load sets.

    Attributes:
        model: the engine's model section.
        states: returns the names of the states to set, by the table's row of a parameter.
    """

    engine: Engine
    model: ModelConfig
    states: Callable[[arch.ParameterSpec], Sequence[str]]
    grid: Grid


def compare_states(target: LoadTarget, source: StoredCheckpoint) -> list[str]:
    """Read all states out of the engine and compare their hashes with those of the manifest.

    Threads make hashes while the next states are read.

    Returns:
        the states that differ, on the rank that owns them.
    """
    differing = []
    hashing: deque[tuple[str, Future[bool]]] = deque()
    engine, grid = target.engine, target.grid

    def compare() -> None:
        what, same = hashing.popleft()
        if not same.result():
            differing.append(what)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for owner in owned_parameters(engine, target.model, grid):
            # a frozen weight has no fp32 master: the engine holds it rounded to its own type
            dtype = torch.float32 if owner.parameter.requires_grad else owner.parameter.dtype
            for state in target.states(owner.row):
                for name, value in read_canonical(engine, owner, state, grid).items():
                    same = pool.submit(_is_written, value, dtype, name, state, source)
                    hashing.append((f"{state} of {name}", same))
                    if len(hashing) > _PENDING:
                        compare()
        while hashing:
            compare()
    return differing


def _is_written(
    value: Tensor, dtype: torch.dtype, name: str, state: str, source: StoredCheckpoint
) -> bool:
    """Return whether a tensor of the engine is the one that was written, rounded to `dtype`.

    DeepSpeed assembles the parts of a parameter by adding zeros (`safe_get_full_fp32_param` in
    deepspeed/utils/tensor_fragment.py), which turns -0 into 0. If hashes differ, the tensor on the
    disk is therefore checked against its own hash, and then compared number by number.
    """
    entry = source.manifest.tensors[name].states.get(state)
    if entry is None:
        return False  # the manifest lacks it, which the load has reported
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
