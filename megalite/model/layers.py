"""The pieces blocks are made of: linear maps, norms, positions, attention, the feed-forward net.

B batch   T tokens   D width (hidden_size)   F width inside the feed-forward net
S tokens that are looked at   N query heads   K key/value heads   H head width   V vocabulary

Parameters are created empty; `megalite.model.init` fills them. Weights are [out, in]. Projections
that read the same input are one parameter in memory (qkv_proj, gate_up_proj): one large matrix
product is faster than two or three small ones. `megalite.arch` maps them to the separate tensors
that checkpoints hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config import AdapterConfig, ModelConfig, RopeScalingConfig
from megalite.model.attend import attend
from megalite.model.cache import LayerCache

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Linear(nn.Module):
    """`x @ weight.T (+ bias)` with an uninitialised weight [out, in].

    An adapter adds `scale B (A x)` (LoRA, Hu et al. 2021); that of a fused projection has an A and
    a B for each part it has one for, stacked.

    Args:
        parts: the rows of each projection that is fused in it, by name.
    Attributes:
        product: what multiplies instead of `F.linear`, if anything (megalite.model.decoding).
    """

    product: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        adapter: AdapterConfig | None = None,
        parts: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        own = {n: size for n, size in (parts or {}).items() if adapter and n in adapter.targets}
        self.adapter, self._parts, self._own = adapter if own else None, dict(parts or {}), own
        if self.adapter is not None:
            rank = self.adapter.rank
            self.lora_A = nn.Parameter(torch.empty(len(own) * rank, in_features))
            self.lora_B = nn.Parameter(torch.empty(sum(own.values()), rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight) if self.product is None else self.product(x, self.weight)
        if self.adapter is not None:
            y = y + self.raised(self.lowered(x))
        # Added outside F.linear: DeepSpeed's ZeRO-3 version of it adds the bias in place, which
        # selective recompute would repeat.
        return y if self.bias is None else y + self.bias

    def lowered(self, x: Tensor) -> Tensor:
        """A x of every part that has an adapter, side by side: [..., in] -> [..., parts x rank]."""
        assert self.adapter is not None
        return F.linear(F.dropout(x, self.adapter.dropout, self.training), self.lora_A)

    def raised(self, low: Tensor) -> Tensor:
        """What an adapter adds, by what `lowered` gave: -> [..., out]."""
        assert self.adapter is not None
        lows = iter(low.chunk(len(self._own), dim=-1))
        factors = iter(self.lora_B.split(list(self._own.values())))
        added = [
            F.linear(next(lows), next(factors)) if name in self._own else low.new_zeros(())
            for name in self._parts
        ]
        shapes = [(*low.shape[:-1], size) for size in self._parts.values()]
        whole = [part.expand(shape) for part, shape in zip(added, shapes, strict=True)]
        return self.adapter.scale * torch.cat(whole, dim=-1)


def _linear(config: ModelConfig, in_features: int, bias: bool, **parts: int) -> Linear:
    """A projection of a block, or several that are fused, with the adapter it is to have."""
    rows = sum(parts.values())
    return Linear(in_features, rows, bias=bias, adapter=config.adapter, parts=parts)


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


def rope_table(positions: Tensor, config: ModelConfig) -> Tensor:
    """Cosines and sines of rotary positions (Su et al. 2021), halves side by side as in Llama.

    Args:
        positions: [T], or [B, T] where documents restart them.
    Returns:
        fp32 [2, 1 or B, T, 1, H/2]; made anew each forward, a few tiny kernels, so that no cast of
        the model to half precision can round it.
    """
    H, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, H, 2, device=positions.device, dtype=torch.float32)
    rates = theta ** (-exponents / H)
    if scaling is not None:
        rates = _stretch(rates, scaling, theta)
    angles = positions[..., None].float() * rates
    if angles.dim() == 2:
        angles = angles[None]
    table = torch.stack((angles.cos(), angles.sin())).unsqueeze(-2)
    if scaling is None or scaling.rope_type != "yarn":
        return table
    return table * (scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0)


def _stretch(rates: Tensor, scaling: RopeScalingConfig, theta: float) -> Tensor:
    """Radians a token of each pair, over a longer sequence: [H/2] -> [H/2].

    linear: Chen et al. 2023. llama3: Llama 3.1's. yarn: Peng et al. 2023, "by parts".
    """
    slow, length = rates / scaling.factor, scaling.original_max_position_embeddings
    if scaling.rope_type == "linear" or length is None:
        return slow
    if scaling.rope_type == "llama3":
        turns = length * rates / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = (turns - low) / (high - low)
        smooth = (1 - keep) * slow + keep * rates
        return torch.where(turns > high, rates, torch.where(turns < low, slow, smooth))
    pairs, H = len(rates), 2 * len(rates)

    def pair(turns: float) -> float:
        """The pair whose wave turns so often in the old length."""
        return H * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), H - 1)
    ramp = torch.arange(pairs, device=rates.device, dtype=torch.float32) - first
    keep = 1 - (ramp / max(last - first, 0.001)).clamp(0, 1)
    return slow * (1 - keep) + rates * keep


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


def distance_buckets(
    queries: int, keys: int, config: ModelConfig, *, causal: bool, device: torch.device
) -> Tensor:
    """T5's bucket of the way from each of the last `queries` tokens to each key: int64 [T, keys].

    Half of a direction's buckets are single distances, the others grow by powers (Raffel et al.
    2019).
    """
    buckets, most = config.relative_attention_num_buckets, config.relative_attention_max_distance
    places = torch.arange(keys, device=device)
    way = places[None, :] - places[keys - queries :, None]
    first = torch.zeros_like(way)
    if not causal:
        buckets //= 2
        first = (way > 0).long() * buckets
    distance = way.abs() if not causal else (-way).clamp_min(0)
    single = buckets // 2
    grown = torch.log(distance.float() / single) / math.log(most / single) * (buckets - single)
    far = (single + grown.clamp_min(0).long()).clamp_max(buckets - 1)
    return first + torch.where(distance < single, distance, far)


class Attention(nn.Module):
    """Self-attention with grouped key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_width, self.dropout = config.head_dim, config.attention_dropout
        self.causal, self.scale = causal, config.attention_multiplier
        inner = self.heads * self.head_width
        kv = self.kv_heads * self.head_width
        self.qkv_proj = _linear(
            config, config.hidden_size, config.attention_bias, q_proj=inner, k_proj=kv, v_proj=kv
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_width, config.norm_eps)
            self.k_norm = RMSNorm(self.head_width, config.norm_eps)
        bias = config.attention_output_bias
        self.o_proj = _linear(config, inner, bias, o_proj=config.hidden_size)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Tensor | None,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        groups = (self.heads, self.kv_heads, self.kv_heads)
        qkv = self.qkv_proj(x_BTD).unflatten(-1, (sum(groups), self.head_width))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH, v_BTKH = qkv.split(groups, dim=2)
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
            if rope is not None:
                q_BTNH, k_BTKH = rotate(q_BTNH, rope), rotate(k_BTKH, rope)
        elif rope is None:
            q_BTNH, k_BTKH, v_BTKH = qkv.split(groups, dim=2)
        else:  # q and k turn together, in one pass
            turned, v_BTKH = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            q_BTNH, k_BTKH = rotate(turned, rope).split(groups[:2], dim=2)
        k_BKTH, v_BKTH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        if cache is not None:
            k_BKTH, v_BKTH = cache.extend(k_BKTH, v_BKTH)
        y_BTQ = attend(
            q_BTNH,
            k_BKTH,
            v_BKTH,
            mask,
            dropout=self.dropout if self.training else 0.0,
            causal=self.causal and q_BTNH.shape[1] > 1,
            scale=self.scale,
        )
        return self.o_proj(y_BTQ)


class CrossAttention(nn.Module):
    """Attention to the hidden states of another text."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kv_heads, self.head_width = config.num_key_value_heads, config.head_dim
        self.dropout, self.scale = config.attention_dropout, config.attention_multiplier
        D, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = _linear(config, D, config.attention_bias, q_proj=inner)
        kv = self.kv_heads * self.head_width
        self.kv_proj = _linear(config, D, config.attention_bias, k_proj=kv, v_proj=kv)
        self.o_proj = _linear(config, inner, config.attention_output_bias, o_proj=D)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor | None,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        if cache is not None and cache.memory is not None:
            k_BKSH, v_BKSH = cache.memory
        else:
            kv = self.kv_proj(memory_BSD).unflatten(-1, (2 * self.kv_heads, self.head_width))
            k_BKSH, v_BKSH = kv.transpose(1, 2).chunk(2, dim=1)
            if cache is not None:
                cache.memory = k_BKSH, v_BKSH
        q_BTNH = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_width))
        dropout = self.dropout if self.training else 0.0
        y_BTQ = attend(
            q_BTNH, k_BKSH, v_BKSH, mask, dropout=dropout, causal=False, scale=self.scale
        )
        return self.o_proj(y_BTQ)


class MLP(nn.Module):
    """The feed-forward net, gated (swiglu, geglu) or plain."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation, self.gated = config.activation, config.gated
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if self.gated:
            self.gate_up_proj = _linear(config, D, bias, gate_proj=inner, up_proj=inner)
        else:
            self.up_proj = _linear(config, D, bias, up_proj=inner)
        self.down_proj = _linear(config, inner, bias, down_proj=D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate_BTF, up_BTF = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
            return self.down_proj(act(gate_BTF) * up_BTF)
        return self.down_proj(act(self.up_proj(x_BTD)))
