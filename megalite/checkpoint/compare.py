"""The proof of a load: what the engine holds is what the manifest says was written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megalite import arch
from megalite.checkpoint.states import owned_parameters, read_canonical, value_hash
from megalite.config import ModelConfig
from megalite.engine import Engine
from megalite.formats import checkpoint as disk
from megalite.parallel import Grid

States = Callable[[arch.ParameterSpec], Sequence[str]]  # the states to set, by the table's row
_PENDING = 4  # tensors whose hashes are being made, at most


def compare_states(
    engine: Engine,
    model: ModelConfig,
    states: States,
    grid: Grid,
    folder: Path,
    manifest: disk.Manifest,
) -> list[str]:
    """Read every state back out of the engine and hold its hash against the manifest's.

    Returns:
        what differs, on the rank that owns it.

    Hashes are made by threads while the next states are read.
    """
    differing = []
    hashing: deque[tuple[str, Future[bool]]] = deque()

    def compare() -> None:
        what, same = hashing.popleft()
        if not same.result():
            differing.append(what)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for owned in owned_parameters(engine, model, grid):
            # a frozen weight has no fp32 master: the engine holds it rounded to its own type
            dtype = torch.float32 if owned.parameter.requires_grad else owned.parameter.dtype
            for state in states(owned.row):
                for name, value in read_canonical(engine, owned, state, grid).items():
                    same = pool.submit(_is_written, value, dtype, name, state, folder, manifest)
                    hashing.append((f"{state} of {name}", same))
                    if len(hashing) > _PENDING:
                        compare()
        while hashing:
            compare()
    return differing


def _is_written(
    value: Tensor,
    dtype: torch.dtype,
    name: str,
    state: str,
    folder: Path,
    manifest: disk.Manifest,
) -> bool:
    """Whether a tensor out of the engine is the one that was written, by its hash.

    The engine may hold it rounded to `dtype`.

    DeepSpeed puts the parts of a parameter together by adding zeros, which turns -0 into 0: where
    hashes differ, the tensor on the disk is held against its own hash, and then number by number.
    """
    entry = manifest.tensors[name].states.get(state)
    if entry is None:
        return False  # the manifest lacks it, which reading it has said already
    if value_hash(value) == entry.sha256:
        return True
    stored = torch.empty(value.shape)
    box = tuple(slice(0, size) for size in value.shape)
    try:
        disk.read_tensor(folder / entry.file, name, stored.numpy(), box)
    except (OSError, ValueError, KeyError):
        return False
    held = stored.to(dtype).float()
    return value_hash(stored) == entry.sha256 and torch.equal(held, value)
