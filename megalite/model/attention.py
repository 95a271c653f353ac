"""Attention: masks, softmax(q k^T) v, and the modules that project to queries, keys and values.

B batch   T tokens   S tokens that are attended to   D width   N query heads   K key/value heads
H head width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config import ModelConfig
from megalite.model.cache import LayerCache
from megalite.model.linear import ColumnLinear, RowLinear
from megalite.model.norms import RMSNorm
from megalite.model.positions import apply_rope
from megalite.model.regions import Regions


def attention_mask(
    queries: int,
    total: int,
    *,
    causal: bool,
    window: int | None,
    document_ids: Tensor | None,
    keys: Tensor | None,
    device: torch.device,
    explicit: bool = False,
) -> Tensor | None:
    """Return which tokens the last `queries` of `total` tokens attend to.

    Args:
        causal: whether a token attends only to itself and to tokens before it.
        window: number of tokens that a token attends to, itself included. None means no limit.
        document_ids: [B, total]. A token attends only to tokens of its own document.
        keys: bool [B, total]. If given, only these tokens are attended to.
        explicit: if true, causality is always part of the mask. If false, it may be left to the
            kernel.
    Returns:
        bool [B or 1, 1, queries, total]. None means no limit except the kernel's causality.
    """
    rows: Tensor | None = None
    narrow = window is not None and window < total
    # A single query attends to all earlier tokens. Several queries that begin the text need no
    # mask: the kernel is causal.
    if causal and queries > 1 and (explicit or narrow or keys is not None or queries < total):
        rows = torch.ones(queries, total, dtype=torch.bool, device=device).tril(total - queries)
    elif causal and document_ids is not None:
        rows = torch.ones(queries, total, dtype=torch.bool, device=device).tril()
    if narrow:
        assert window is not None
        rows = torch.ones(queries, total, dtype=torch.bool, device=device) if rows is None else rows
        rows = rows.triu(total - queries - window + 1)
    mask = None if rows is None else rows[None, None]
    if document_ids is not None:
        same = (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
        mask = same if mask is None else same & mask
    if keys is not None:
        seen = keys[:, None, None, :]
        if queries > 1:  # padding attends to itself: a softmax over no key is NaN
            seen = seen | torch.eye(total, dtype=torch.bool, device=device)[total - queries :]
        mask = seen if mask is None else seen & mask
    return mask


def attend(
    q_BTNH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Compute softmax(scale q k^T + mask) v.

    Each key/value head serves N / K query heads.

    Args:
        mask: bool, or numbers that are added to the scores: [B or 1, N or 1, T, S].
        dropout: share of weights that is set to zero.
        causal: whether a token attends only to itself and to earlier tokens. Ignored with a mask.
        scale: factor of the scores. None means 1 / sqrt(H).
    Returns:
        [B, T, N x H].
    """
    if q_BTNH.shape[1] == 1 and not (q_BTNH.is_cuda or torch.is_grad_enabled()):
        return _attend_once(q_BTNH, k_BKSH, v_BKSH, mask, scale)
    heads = q_BTNH.shape[2]
    kv_heads = k_BKSH.shape[1]
    shared = heads != kv_heads
    if shared and mask is not None and q_BTNH.is_cuda:
        # No fused kernel of torch for GPUs supports a mask with grouped heads. The plain kernel
        # would store [T, T] scores.
        k_BKSH, v_BKSH = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k_BKSH, v_BKSH))
        shared = False
    y_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BKSH,
        v_BKSH,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        enable_gqa=shared,
        scale=scale,
    )
    return y_BNTH.transpose(1, 2).flatten(2)


def _attend_once(
    q_B1NH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Compute `attend` for one query per text on a CPU, four times as fast as the fused kernel.

    G query heads of a key/value head
    """
    B, _, N, H = q_B1NH.shape
    q_BKGH = q_B1NH.view(B, k_BKSH.shape[1], -1, H) * (H**-0.5 if scale is None else scale)
    scores_BKGS = q_BKGH @ k_BKSH.transpose(-1, -2)
    if mask is not None:  # one for all heads, or a bias for each head
        mask = mask if mask.shape[1] == 1 else mask.view(*q_BKGH.shape[1:3], -1)
        if mask.dtype == torch.bool:
            scores_BKGS = scores_BKGS.masked_fill(~mask, -math.inf)
        else:
            scores_BKGS = scores_BKGS + mask
    return (scores_BKGS.softmax(dim=-1) @ v_BKSH).view(B, 1, N * H)


class Attention(nn.Module):
    """Self-attention with grouped key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, regions: Regions, *, causal: bool) -> None:
        super().__init__()
        self.regions = regions
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_width = config.head_dim
        self.dropout = config.attention_dropout
        self.causal = causal
        self.scale = config.attention_multiplier
        inner = self.heads * self.head_width
        kv = self.kv_heads * self.head_width
        self.qkv_proj = ColumnLinear(
            config,
            regions,
            config.hidden_size,
            bias=config.attention_bias,
            q_proj=inner,
            k_proj=kv,
            v_proj=kv,
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_width, config.norm_eps)
            self.k_norm = RMSNorm(self.head_width, config.norm_eps)
        self.o_proj = RowLinear(
            config, regions, inner, bias=config.attention_output_bias, o_proj=config.hidden_size
        )

    def forward(
        self,
        x_BTD: Tensor,
        rope: Tensor | None,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        with self.regions.head_randomness(x_BTD, dropout=self.training and self.dropout > 0):
            q_BTNH, k_BKTH, v_BKTH = self.project(x_BTD, rope)
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

    def project(self, x_BTD: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries [B, T, N, H], keys [B, K, T, H] and values [B, K, T, H]."""
        groups = (self.heads, self.kv_heads, self.kv_heads)
        qkv = self.qkv_proj(x_BTD).unflatten(-1, (sum(groups), self.head_width))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH, v_BTKH = qkv.split(groups, dim=2)
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
            if rope is not None:
                q_BTNH, k_BTKH = apply_rope(q_BTNH, rope), apply_rope(k_BTKH, rope)
        elif rope is None:
            q_BTNH, k_BTKH, v_BTKH = qkv.split(groups, dim=2)
        else:  # q and k rotate together, in one pass
            qk, v_BTKH = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            q_BTNH, k_BTKH = apply_rope(qk, rope).split(groups[:2], dim=2)
        return q_BTNH, k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens to the hidden states of the encoder."""

    def __init__(self, config: ModelConfig, regions: Regions) -> None:
        super().__init__()
        self.regions = regions
        self.kv_heads = config.num_key_value_heads
        self.head_width = config.head_dim
        self.dropout = config.attention_dropout
        self.causal = False
        self.scale = config.attention_multiplier
        D = config.hidden_size
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = ColumnLinear(config, regions, D, bias=config.attention_bias, q_proj=inner)
        kv = self.kv_heads * self.head_width
        self.kv_proj = ColumnLinear(
            config, regions, D, bias=config.attention_bias, k_proj=kv, v_proj=kv
        )
        self.o_proj = RowLinear(config, regions, inner, bias=config.attention_output_bias, o_proj=D)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor | None,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        with self.regions.head_randomness(x_BTD, dropout=self.training and self.dropout > 0):
            if cache is not None and cache.memory is not None:
                k_BKSH, v_BKSH = cache.memory
            else:
                k_BKSH, v_BKSH = self.project_memory(memory_BSD)
                if cache is not None:
                    cache.memory = k_BKSH, v_BKSH
            q_BTNH = self.project_queries(x_BTD)
            dropout = self.dropout if self.training else 0.0
            y_BTQ = attend(
                q_BTNH, k_BKSH, v_BKSH, mask, dropout=dropout, causal=False, scale=self.scale
            )
            return self.o_proj(y_BTQ)

    def project_queries(self, x_BTD: Tensor) -> Tensor:
        """Return the queries of the decoder's tokens: [B, T, N, H]."""
        q_BTNH: Tensor = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_width))
        return q_BTNH

    def project_memory(self, memory_BSD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the encoder's tokens: [B, K, S, H] each."""
        kv = self.kv_proj(memory_BSD).unflatten(-1, (2 * self.kv_heads, self.head_width))
        k_BKSH, v_BKSH = kv.transpose(1, 2).chunk(2, dim=1)
        return k_BKSH, v_BKSH
