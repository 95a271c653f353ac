"""The pieces blocks are made of: linear maps, norms, positions, attention, the feed-forward net.

B batch   T tokens   D width (hidden_size)   F width inside the feed-forward net
N query heads   K key/value heads   H head width   V vocabulary

Parameters are created empty; `megalite.model.init` fills them. Weights are [out, in]. Projections
that read the same input are one parameter in memory (qkv_proj, gate_up_proj): one large matrix
product is faster than two or three small ones. `megalite.shapes` maps them to the separate tensors
that checkpoints hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
GATED = ("swiglu", "geglu")  # Shazeer 2020: one half of the product gates the other


class Linear(nn.Module):
    """`x @ weight.T (+ bias)` with an uninitialised weight [out, in]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        # Added outside F.linear: DeepSpeed's ZeRO-3 version of it adds the bias in place, which
        # selective recompute would repeat.
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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
    """The norm a configuration names."""
    kind = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[config.norm]
    return kind(config.hidden_size, config.norm_eps)


def rope_table(positions: Tensor, head_width: int, theta: float) -> Tensor:
    """Cosines and sines of rotary positions (Su et al. 2021), halves side by side as in Llama.

    Args:
        positions: [T], or [B, T] where documents restart them.
    Returns:
        fp32 [2, 1 or B, T, 1, H/2]; made anew each forward, a few tiny kernels, so that no cast of
        the model to half precision can round it.
    """
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * theta ** (-exponents / head_width)
    if angles.dim() == 2:
        angles = angles[None]
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(-2)


def rotate(x_BTNH: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x[h], x[h + H/2]) by its position's angle."""
    cos, sin = table.to(x_BTNH.dtype)
    left, right = x_BTNH.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Fixed positions of Vaswani et al. 2017, sine half then cosine half: fp32 [..., width]."""
    half = (width + 1) // 2
    rates = torch.arange(half, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * torch.exp(rates * (-math.log(10000.0) / half))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :width]


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_width, self.dropout = config.head_dim, config.attention_dropout
        inner = self.heads * self.head_width
        fused = inner + 2 * self.kv_heads * self.head_width
        bias = config.attention_bias
        self.qkv_proj = Linear(config.hidden_size, fused, bias=bias)
        self.o_proj = Linear(inner, config.hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
        groups = (self.heads, self.kv_heads, self.kv_heads)
        qkv = self.qkv_proj(x_BTD).unflatten(-1, (sum(groups), self.head_width))
        if rope is None:
            q_BTNH, k_BTKH, v_BTKH = qkv.split(groups, dim=2)
        else:  # q and k turn together, in one pass
            turned, v_BTKH = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            q_BTNH, k_BTKH = rotate(turned, rope).split(groups[:2], dim=2)
        shared = self.kv_heads != self.heads
        if shared and mask is not None and x_BTD.is_cuda:
            # the fused GPU kernels that take a mask share no heads; without them [T, T] scores
            k_BTKH, v_BTKH = (
                t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (k_BTKH, v_BTKH)
            )
            shared = False
        y_BNTH = F.scaled_dot_product_attention(
            q_BTNH.transpose(1, 2),
            k_BTKH.transpose(1, 2),
            v_BTKH.transpose(1, 2),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=shared,
        )
        return self.o_proj(y_BNTH.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The feed-forward net, gated (swiglu, geglu) or plain."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if self.activation in GATED:
            self.gate_up_proj = Linear(D, 2 * inner, bias=bias)
        else:
            self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if self.activation in GATED:
            gate_BTF, up_BTF = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
            return self.down_proj(act(gate_BTF) * up_BTF)
        return self.down_proj(act(self.up_proj(x_BTD)))
