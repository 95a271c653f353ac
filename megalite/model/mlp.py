"""The feed-forward net of a block.

B batch   T tokens   D width (hidden_size)   F width inside the feed-forward net
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config import ModelConfig
from megalite.model.linear import ColumnLinear, RowLinear
from megalite.model.regions import Regions

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """The feed-forward net, gated (swiglu, geglu) or plain."""

    def __init__(self, config: ModelConfig, regions: Regions) -> None:
        super().__init__()
        self.activation = config.activation
        self.gated = config.gated
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if self.gated:
            self.gate_up_proj = ColumnLinear(
                config, regions, D, bias=bias, gate_proj=inner, up_proj=inner
            )
        else:
            self.up_proj = ColumnLinear(config, regions, D, bias=bias, up_proj=inner)
        self.down_proj = RowLinear(config, regions, inner, bias=bias, down_proj=D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        if self.gated:
            gate_BTF, up_BTF = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
            return self.down_proj(activate(gate_BTF) * up_BTF)
        return self.down_proj(activate(self.up_proj(x_BTD)))
