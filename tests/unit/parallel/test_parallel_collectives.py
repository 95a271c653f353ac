# covers: megalite/parallel/collectives.py
"""Forward and backward of each collective on two ranks, compared with sums in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.env import Launch
from tests.helpers.ranks import run_ranks

B, T, D, OUT = 3, 4, 5, 6
RANKS = 2


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pass_through(launch: Launch, name: str, tokens: int) -> tuple[Any, Any]:
    """Pass this rank's tensor to a collective. Return the output and the input's gradient."""
    from megalite.parallel import collectives, start

    grid = start(launch, tensor=RANKS)
    x = numbers(launch.rank, B, tokens, D).requires_grad_()
    y = getattr(collectives, name)(x, grid.tensor_group)
    y.backward(numbers(10 + launch.rank, *y.shape))
    assert x.grad is not None
    return y.detach().numpy(), x.grad.numpy()


def summed(parts: list[Tensor]) -> list[Tensor]:
    return [torch.stack(parts).sum(0)] * RANKS


def gathered(parts: list[Tensor]) -> list[Tensor]:
    return [torch.cat(parts, dim=1)] * RANKS


def local_tokens(parts: list[Tensor]) -> list[Tensor]:
    """Return each rank's share of the tokens of its tensor."""
    return [part.chunk(RANKS, dim=1)[rank] for rank, part in enumerate(parts)]


def same(parts: list[Tensor]) -> list[Tensor]:
    return parts


# by the name of a collective: tokens of the input, expected forward, expected backward
CASES: dict[str, tuple[int, Callable[..., list[Tensor]], Callable[..., list[Tensor]]]] = {
    "copy_to_tp": (T, same, summed),
    "reduce_from_tp": (T, summed, same),
    "gather_seq": (T // RANKS, gathered, lambda parts: local_tokens(summed(parts))),
    "reduce_scatter_seq": (T, lambda parts: local_tokens(summed(parts)), gathered),
    "scatter_seq": (T, local_tokens, gathered),
    "gather_seq_replicated": (T // RANKS, gathered, local_tokens),
}


@pytest.mark.parametrize("name", CASES)
def test_collective_has_its_forward_and_the_transpose_as_backward(name: str) -> None:
    tokens, forward, backward = CASES[name]
    results = run_ranks(pass_through, RANKS, name, tokens)
    outputs = forward([numbers(rank, B, tokens, D) for rank in range(RANKS)])
    grads = backward([numbers(10 + rank, *outputs[rank].shape) for rank in range(RANKS)])
    for rank, (y, grad) in enumerate(results):
        torch.testing.assert_close(torch.from_numpy(y), outputs[rank])
        torch.testing.assert_close(torch.from_numpy(grad), grads[rank])


def multiply(launch: Launch, tokens: bool, frozen: str) -> tuple[Any, Any, Any]:
    """Compute this rank's column-parallel product. Return the output and both gradients."""
    from megalite.parallel import start
    from megalite.parallel.collectives import ColumnParallelMatmul

    grid = start(launch, tensor=RANKS)
    whole = numbers(1, B, T, D)
    x = whole.chunk(RANKS, dim=1)[launch.rank].contiguous() if tokens else whole
    weight = numbers(2, OUT, D).chunk(RANKS)[launch.rank].contiguous()
    x.requires_grad_(frozen != "input")
    weight.requires_grad_(frozen != "weight")
    y = ColumnParallelMatmul.apply(x, weight, grid.tensor_group, tokens)
    y.backward(numbers(3, B, T, OUT).chunk(RANKS, dim=-1)[launch.rank])
    grads = (None if t.grad is None else t.grad.numpy() for t in (x, weight))
    return y.detach().numpy(), *grads


@pytest.mark.parametrize("frozen", ["nothing", "input", "weight"])
@pytest.mark.parametrize("tokens", [False, True])
def test_column_parallel_product_equals_a_linear_layer(tokens: bool, frozen: str) -> None:
    x, weight = numbers(1, B, T, D).requires_grad_(), numbers(2, OUT, D).requires_grad_()
    y = x @ weight.t()
    y.backward(numbers(3, B, T, OUT))
    assert x.grad is not None
    assert weight.grad is not None
    for rank, (part, grad_x, grad_weight) in enumerate(run_ranks(multiply, 2, tokens, frozen)):
        expected = x.grad.chunk(RANKS, dim=1)[rank] if tokens else x.grad
        close = torch.testing.assert_close
        close(torch.from_numpy(part), y.detach().chunk(RANKS, dim=-1)[rank])
        assert (grad_x is None) == (frozen == "input")
        assert (grad_weight is None) == (frozen == "weight")
        if grad_x is not None:
            close(torch.from_numpy(grad_x), expected)
        if grad_weight is not None:
            close(torch.from_numpy(grad_weight), weight.grad.chunk(RANKS)[rank])


def sums_a_copy(launch: Launch) -> bool:
    """Return whether a sum does not change its input, as selective recompute requires."""
    from megalite.parallel import start
    from megalite.parallel.collectives import all_reduce_async

    grid = start(launch, tensor=RANKS)
    x = torch.ones(3)
    y = all_reduce_async(x, grid.tensor_group)()
    return torch.equal(x, torch.ones(3)) and torch.equal(y, torch.full((3,), float(RANKS)))


def test_all_reduce_async_does_not_change_its_input() -> None:
    assert run_ranks(sums_a_copy, RANKS) == [True, True]
