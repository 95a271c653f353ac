"""Norms over the last dimension, registered under the names of `model.norm`.

A norm is a module that is constructed from a width and an eps. Facts for code without torch:

    parameters    names of the parameters, each [width]; ("weight",) by default
    composite     whether PyTorch has no fused CPU kernel for the norm, so that its input is saved
                  in fp32
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite import registry
from megalite.config import ModelConfig


@registry.norms.register("rmsnorm", composite=True)
class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self._few_rows = False

    def forward(self, x: Tensor) -> Tensor:
        if self._few_rows:
            # half as many operations as F.rms_norm runs on a CPU; call overhead dominates each
            square = (x * x).sum(dim=-1, keepdim=True)
            return (x * square.mul_(1 / x.shape[-1]).add_(self.eps).rsqrt_()).mul_(self.weight)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def prepare_for_decoding(self) -> None:
        """Use the operations that are fastest for few rows on a CPU, without a gradient."""
        self._few_rows = True


@registry.norms.register("layernorm", parameters=("weight", "bias"))
class LayerNorm(nn.Module):
    """Layer norm with weight and bias (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the norm that a configuration names, over the model's width."""
    norm: nn.Module = registry.norms.load(config.norm)(config.hidden_size, config.norm_eps)
    return norm
