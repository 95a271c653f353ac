"""Muon: momentum updates that are orthogonalised matrix by matrix, on any layout.

The weights of the blocks' matrix products take this update (Jordan et al. 2024). Its step size is
that of Liu et al. 2025 (arXiv 2502.16982), which suits AdamW's learning rates and decay. All other
parameters take AdamW's update.

Orthogonalisation needs all elements of a matrix, but engines and tensor parallelism shard it. So
the ranks assemble each canonical tensor (q, k, v, gate and up separately, as in a checkpoint). One
rank orthogonalises it, and each rank takes its part of the result. So neither the number of ranks
nor fused parameters change the update. Gradients are clipped before, as for every other optimizer
here.

n elements of a part of the matrices, flat   R rows   C columns
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite import arch
from megalite.parallel import Grid

_STEPS = 5
# coefficients of a quintic that is steep at zero (Jordan et al. 2024)
_A = 3.4445
_B = -4.7750
_C = 2.0315
_RMS = 0.2  # root mean square of AdamW's updates, measured by Liu et al.
_BATCH = 1 << 26  # elements that are assembled at the same time: 256 MiB


@dataclass(frozen=True)
class Fragment:
    """A range of a rank's part of a parameter that is stored in a flat tensor of an engine.

    Attributes:
        row: specification of the parameter.
        start: first element in the flattened part.
        length: number of elements; 0 if the flat tensor has none.
        offset: first element in the flat tensor.
    """

    row: arch.ParameterSpec
    start: int
    length: int
    offset: int

    def in_flat(self, flat_n: Tensor) -> Tensor:
        """Return a view of these elements in the engine's flat tensor."""
        return flat_n.view(-1)[self.offset : self.offset + self.length]

    def in_part(self, part: Tensor) -> Tensor:
        """Return a view of these elements in the rank's part."""
        return part.view(-1)[self.start : self.start + self.length]


class Muon(torch.optim.Optimizer):
    """Optimizer that gives groups with `matrices` true Muon's update, and others AdamW's.

    Attributes:
        orthogonalize: set by the engine. It takes a parameter in the engine's form and the update
            of the same shape, which it changes in place. Every rank calls it for the same
            parameters in the same order.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        others = [group for group in groups if not group["matrices"]]
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        self.orthogonalize: Callable[[Tensor, Tensor], None] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"] if group["matrices"] else ():
                if parameter.grad is not None:
                    self._update(parameter, group)
        # an engine may have replaced the parameters and states by its own
        self._adamw.param_groups = [g for g in self.param_groups if not g["matrices"]]
        self._adamw.state = self.state
        self._adamw.step()

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        momentum = self.state[parameter]["momentum_buffer"]
        assert gradient is not None
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])  # Nesterov momentum
        assert self.orthogonalize is not None, "the engine must set orthogonalize"
        self.orthogonalize(parameter, update)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])


def newton_schulz(matrix_RC: Tensor) -> Tensor:
    """Return approximately U V^T of the matrix's singular value decomposition: [R, C].

    The result has the matrix's dtype. The products run in bf16 on a GPU, and in fp32 on a CPU.
    """
    x = matrix_RC.bfloat16() if matrix_RC.is_cuda else matrix_RC
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.t()
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.t()
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.t()).to(matrix_RC.dtype)


def orthogonalize(
    update_n: Tensor, fragments: Iterable[Fragment], grid: Grid, *, replicas: bool
) -> None:
    """Orthogonalise the matrices of which `update_n` contains parts, in place; a collective.

    Args:
        fragments: fragments of every matrix of the flat tensor, on every rank in the same order.
        replicas: whether data-parallel ranks hold the same parts. If false, each holds others.
    """
    size, rank = grid.world_size, grid.rank
    if replicas:
        size = grid.mesh.tensor
        rank = grid.at.tensor_rank
    group = grid.tensor_group if replicas and size > 1 else None  # None means all ranks
    for batch in _batches(fragments):
        tensors = [tensor for fragment in batch for tensor in fragment.row.tensors]
        elements = sum(tensor.elements for tensor in tensors)
        whole = torch.zeros(elements, dtype=torch.float32, device=grid.device)
        result = torch.zeros_like(whole)
        updates, results = _views(whole, tensors), _views(result, tensors)
        local = [fragment for fragment in batch if fragment.length]
        _copy_in(local, update_n, updates, grid)
        if size > 1:
            dist.all_reduce(whole, group=group)
        for number, tensor in enumerate(tensors):
            if number % size == rank:
                step = _RMS * max(tensor.shape) ** 0.5
                results[tensor.name].copy_(newton_schulz(updates[tensor.name]).mul_(step))
        if size > 1:
            dist.all_reduce(result, group=group)
        _copy_out(local, update_n, results, grid)


def _copy_in(
    fragments: list[Fragment], update_n: Tensor, tensors: dict[str, Tensor], grid: Grid
) -> None:
    """Copy this rank's fragments into the canonical tensors. Elements of other ranks stay zero."""
    for fragment in fragments:
        part = _zeros(fragment, grid)
        fragment.in_part(part).copy_(fragment.in_flat(update_n))
        for piece in arch.pieces(fragment.row, grid.at):
            tensors[piece.tensor.name][piece.source] = part[piece.target]


def _copy_out(
    fragments: list[Fragment], update_n: Tensor, tensors: dict[str, Tensor], grid: Grid
) -> None:
    """Copy this rank's fragments out of the canonical tensors."""
    for fragment in fragments:
        part = _zeros(fragment, grid)
        for piece in arch.pieces(fragment.row, grid.at):
            part[piece.target] = tensors[piece.tensor.name][piece.source]
        fragment.in_flat(update_n).copy_(fragment.in_part(part))


def _batches(fragments: Iterable[Fragment]) -> Iterator[list[Fragment]]:
    batch = list[Fragment]()
    elements = 0
    for fragment in fragments:
        batch.append(fragment)
        elements += fragment.row.elements
        if elements >= _BATCH:
            yield batch
            batch = []
            elements = 0
    if batch:
        yield batch


def _zeros(fragment: Fragment, grid: Grid) -> Tensor:
    shape = arch.local_shape(fragment.row, grid.at)
    return torch.zeros(shape, device=grid.device)


def _views(flat: Tensor, tensors: list[arch.CanonicalTensor]) -> dict[str, Tensor]:
    parts = flat.split([tensor.elements for tensor in tensors])
    return {t.name: part.view(t.shape) for t, part in zip(tensors, parts, strict=True)}
