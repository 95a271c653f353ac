"""Products of a few rows, as writing text makes them, on a CPU: bound by the reading of weights.

There the usual layout of a weight costs: the product of a vector with a tall matrix reads it twice
as fast by columns, and of 2 to 32 rows oneDNN's kernel is up to five times as fast as the BLAS
that `F.linear` calls.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.model.layers import Linear, RMSNorm
from megalite.model.transformer import LanguageModel

_MOST = 32  # rows; above them the usual kernel is as good


def prepare(model: LanguageModel) -> None:
    """Lay a model out for writing, in place, where that helps; its numbers stay what they are.

    A tall weight keeps its shape and has its columns side by side in memory.
    """
    for parameter in model.parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            return
    for module in model.modules():
        if isinstance(module, Linear):
            _by_columns(module.weight)
            module.product = few_rows
        elif isinstance(module, RMSNorm):
            module.forward = partial(_norm, module)  # type: ignore[method-assign]
    _by_columns(model.head_weight)
    model.product = few_rows


def _by_columns(weight: nn.Parameter) -> None:
    if weight.shape[0] >= weight.shape[1]:
        weight.data = weight.data.t().contiguous().t()


def _norm(module: RMSNorm, x: Tensor) -> Tensor:
    """PyTorch's own is made of twice as many operations, each as long as its call takes."""
    square = (x * x).sum(dim=-1, keepdim=True)
    return (x * square.mul_(1 / x.shape[-1]).add_(module.eps).rsqrt_()).mul_(module.weight)


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by the kernel that is fastest for so many rows."""
    if 1 < x[..., 0].numel() <= _MOST and torch.backends.mkldnn.is_available():
        # an operator of PyTorch's compiler, which another release may have under another name
        with suppress(AttributeError, NotImplementedError):
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
