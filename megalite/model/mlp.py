"""The MLP of a block, and activations under the names of `model.activation`.

An activation that is registered as `gated` is multiplied with a second projection of the input
(Shazeer 2020).

B batch   T tokens   D width (hidden_size)   F width inside the MLP
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megalite import registry
from megalite.config import ModelConfig
from megalite.model.linear import ColumnLinear, RowLinear
from megalite.model.regions import Regions

registry.activations.register("swiglu", gated=True)(F.silu)
registry.activations.register("geglu", gated=True)(F.gelu)
registry.activations.register("geglu_tanh", gated=True)(partial(F.gelu, approximate="tanh"))
registry.activations.register("gelu")(F.gelu)
registry.activations.register("gelu_tanh")(partial(F.gelu, approximate="tanh"))
registry.activations.register("relu")(F.relu)


class MLP(nn.Module):
    """The MLP, gated (swiglu, geglu) or plain."""

    def __init__(self, config: ModelConfig, regions: Regions) -> None:
        super().__init__()
        self.activate = registry.activations.load(config.activation)
        self.gated = config.gated
        D = config.hidden_size
        inner = config.intermediate_size
        bias = config.mlp_bias
        if self.gated:
            self.gate_up_proj = ColumnLinear(
                config, regions, D, bias=bias, gate_proj=inner, up_proj=inner
            )
        else:
            self.up_proj = ColumnLinear(config, regions, D, bias=bias, up_proj=inner)
        self.down_proj = RowLinear(config, regions, inner, bias=bias, down_proj=D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gated:
            gate_BTF, up_BTF = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
            return self.down_proj(self.activate(gate_BTF) * up_BTF)
        return self.down_proj(self.activate(self.up_proj(x_BTD)))
