"""Matrix products of activations and weights, by a kernel that suits the number of rows.

At batch 1 a product is memory-bound: it reads the whole weight. On a CPU, column-major storage of a
tall weight doubles its speed. For 2 to 32 rows oneDNN's kernel is up to five times as fast as the
BLAS that `F.linear` calls.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (x [..., in], weight [out, in], bias [out] or None) -> [..., out]
Matmul = Callable[..., Tensor]

_SMALL_BATCH = 32  # rows; with more of them the usual kernel is as fast (measured)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T (+ bias)`: [..., in] -> [..., out]."""
    return F.linear(x, weight, bias)  # looked up at each call: DeepSpeed's ZeRO-3 replaces it


def small_batch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `matmul(x, weight, bias)`, with the kernel that is fastest for few rows."""
    if 1 < x[..., 0].numel() <= _SMALL_BATCH and torch.backends.mkldnn.is_available():
        # an operator of torch's inductor (torch/_inductor/mkldnn_lowerings.py); other releases may
        # give it another name
        with suppress(AttributeError, NotImplementedError):
            fused: tuple[Any, ...] = ("none", [], "")  # no operation after the product
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *fused)
    return F.linear(x, weight, bias)


def to_column_major(weight: nn.Parameter) -> None:
    """Store a tall weight column-major, in place. Shape and values stay the same."""
    if weight.shape[0] >= weight.shape[1]:
        weight.data = weight.data.t().contiguous().t()
