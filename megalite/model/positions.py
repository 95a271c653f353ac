"""Positions of tokens: rotary, sinusoidal, and T5's relative buckets.

B batch   T tokens   N heads   H head width   D width
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalite.config import ModelConfig, RopeScalingConfig


def rope_table(positions: Tensor, config: ModelConfig) -> Tensor:
    """Return cosines and sines of rotary positions (Su et al. 2021), in Llama's order of halves.

    Each forward computes them again with a few tiny kernels, so that a cast of the model to half
    precision cannot round them.

    Args:
        positions: [T], or [B, T] if positions restart in each document.
    Returns:
        fp32 [2, 1 or B, T, 1, H/2].
    """
    H = config.head_dim
    theta = config.rope_theta
    scaling = config.rope_scaling
    exponents = torch.arange(0, H, 2, device=positions.device, dtype=torch.float32)
    inv_freq = theta ** (-exponents / H)
    if scaling is not None:
        inv_freq = scale_rope(inv_freq, scaling, theta)
    angles = positions[..., None].float() * inv_freq
    if angles.dim() == 2:
        angles = angles[None]
    table = torch.stack((angles.cos(), angles.sin())).unsqueeze(-2)
    if scaling is None or scaling.rope_type != "yarn":
        return table
    # 0.1 ln(factor) + 1: Peng et al. 2023 (YaRN), equation 22
    return table * (scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0)


def scale_rope(inv_freq: Tensor, scaling: RopeScalingConfig, theta: float) -> Tensor:
    """Return the inverse frequencies (radians per token), scaled for longer texts: [H/2] -> [H/2].

    linear: Chen et al. 2023. llama3: Llama 3.1's (transformers' modeling_rope_utils.py). yarn: Peng
    et al. 2023, "by parts".
    """
    interpolated = inv_freq / scaling.factor
    length = scaling.original_max_position_embeddings
    if scaling.rope_type == "linear" or length is None:
        return interpolated
    if scaling.rope_type == "llama3":
        rotations = length * inv_freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = (rotations - low) / (high - low)
        smooth = (1 - keep) * interpolated + keep * inv_freq
        slow_or_smooth = torch.where(rotations < low, interpolated, smooth)
        return torch.where(rotations > high, inv_freq, slow_or_smooth)
    pairs = len(inv_freq)
    H = 2 * len(inv_freq)

    def pair(rotations: float) -> float:
        """Return the pair that makes `rotations` rotations in the original length."""
        return H * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), H - 1)
    ramp = torch.arange(pairs, device=inv_freq.device, dtype=torch.float32) - first
    keep = 1 - (ramp / max(last - first, 0.001)).clamp(0, 1)
    return interpolated * (1 - keep) + inv_freq * keep


def apply_rope(x_BTNH: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair (x[h], x[h + H/2]) by its position's angle.

    Args:
        table: the output of `rope_table`.
    """
    cos, sin = table.to(x_BTNH.dtype)
    left, right = x_BTNH.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def sinusoidal_positions(positions: Tensor, width: int) -> Tensor:
    """Return the position vectors of Vaswani et al. 2017, sines then cosines: fp32 [..., D]."""
    half = (width + 1) // 2
    channels = torch.arange(half, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * torch.exp(channels * (-math.log(10000.0) / half))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :width]


def relative_position_buckets(
    queries: int, keys: int, config: ModelConfig, *, causal: bool, device: torch.device
) -> Tensor:
    """Return T5's bucket of the distance from each of the last `queries` tokens to each key.

    Half of a direction's buckets hold one distance each. The other buckets grow logarithmically
    (Raffel et al. 2019; `_relative_position_bucket` in transformers' modeling_t5.py).

    Returns:
        int64 [queries, keys].
    """
    buckets = config.relative_attention_num_buckets
    max_distance = config.relative_attention_max_distance
    positions = torch.arange(keys, device=device)
    offset = positions[None, :] - positions[keys - queries :, None]
    first = torch.zeros_like(offset)
    if not causal:
        buckets //= 2
        first = (offset > 0).long() * buckets
    distance = offset.abs() if not causal else (-offset).clamp_min(0)
    exact = buckets // 2
    scaled = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    grown = scaled * (buckets - exact)
    far = (exact + grown.clamp_min(0).long()).clamp_max(buckets - 1)
    return first + torch.where(distance < exact, distance, far)
