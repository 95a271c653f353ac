"""Muon: momentum whose matrices are made orthogonal before they are applied, on any layout.

The weights of the blocks' matrix products take this update (Jordan et al. 2024, with the step size
of Liu et al. 2025, arXiv 2502.16982, under which AdamW's learning rates and decay serve); all other
parameters take AdamW's.

An orthogonalised matrix is a function of all its elements, and engines and tensor parallelism keep
parts. So the parts of each canonical tensor (q, k, v, gate, up separately, as in a checkpoint) are
put together, one rank makes it orthogonal, and each takes its part of the result: neither ranks nor
fused layouts change it. Gradients are clipped before, as for every other optimizer here.

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
# a quintic steep at zero (Jordan et al. 2024)
_A = 3.4445
_B = -4.7750
_C = 2.0315
_RMS = 0.2  # of AdamW's updates, as Liu et al. found it
_BATCH = 1 << 26  # elements put together at once: 256 MiB


@dataclass(frozen=True)
class Fragment:
    """Elements of a rank's part of a parameter that lie in a flat tensor of an engine.

    `length` elements from `start` of the flattened parameter lie from `offset` on; none: 0.
    """

    row: arch.ParameterSpec
    start: int
    length: int
    offset: int

    def in_flat(self, flat_n: Tensor) -> Tensor:
        """Return a view of these elements of the engine's tensor."""
        return flat_n.view(-1)[self.offset : self.offset + self.length]

    def in_part(self, part: Tensor) -> Tensor:
        """Return a view of these elements of the rank's part."""
        return part.view(-1)[self.start : self.start + self.length]


class Muon(torch.optim.Optimizer):
    """Groups with `matrices` true take Muon's update, the others AdamW's.

    Attributes:
        orthogonalize: called with a parameter as the engine keeps it and the update of its shape,
            which it changes in place; every rank calls it for the same parameters in one order.
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
        # an engine may have put its own parameters and states in place of those given
        self._adamw.param_groups = [g for g in self.param_groups if not g["matrices"]]
        self._adamw.state = self.state
        self._adamw.step()

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        momentum = self.state[parameter]["momentum_buffer"]
        assert gradient is not None
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])  # Nesterov's look ahead
        assert self.orthogonalize is not None, "an engine says how its parts make whole matrices"
        self.orthogonalize(parameter, update)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])


def newton_schulz(matrix_RC: Tensor) -> Tensor:
    """About U V^T of the matrix's singular value decomposition: [R, C], the matrix's dtype.

    In bf16 on a GPU, where five steps of three products are cheap, in fp32 on a CPU.
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
    """Put the matrices that `update_n` has parts of together, and make each orthogonal in it.

    Args:
        fragments: of every matrix of the flat tensor, on every rank in one order.
        replicas: whether data-parallel ranks hold the same parts, rather than different ones.
    """
    size, rank = grid.world_size, grid.rank
    if replicas:
        size = grid.mesh.tensor
        rank = grid.at.tensor_rank
    group = grid.tensor_group if replicas and size > 1 else None  # None: all ranks
    for batch in _batches(fragments):
        tensors = [tensor for fragment in batch for tensor in fragment.row.tensors]
        elements = sum(tensor.elements for tensor in tensors)
        whole = torch.zeros(elements, dtype=torch.float32, device=grid.device)
        result = torch.zeros_like(whole)
        given, made = _views(whole, tensors), _views(result, tensors)
        held = [fragment for fragment in batch if fragment.length]
        _put_together(held, update_n, given, grid)
        if size > 1:
            dist.all_reduce(whole, group=group)
        for number, tensor in enumerate(tensors):
            if number % size == rank:
                step = _RMS * max(tensor.shape) ** 0.5
                made[tensor.name].copy_(newton_schulz(given[tensor.name]).mul_(step))
        if size > 1:
            dist.all_reduce(result, group=group)
        _take_apart(held, update_n, made, grid)


def _put_together(
    fragments: list[Fragment], update_n: Tensor, tensors: dict[str, Tensor], grid: Grid
) -> None:
    """Copy this rank's fragments into the canonical tensors, which are zero elsewhere."""
    for fragment in fragments:
        part = _zeros(fragment, grid)  # elements of other ranks stay zero
        fragment.in_part(part).copy_(fragment.in_flat(update_n))
        for piece in arch.pieces(fragment.row, grid.at):
            tensors[piece.tensor.name][piece.source] = part[piece.target]


def _take_apart(
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
