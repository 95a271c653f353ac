"""Who may look at what, and the looking: masks, and softmax(q k^T) v.

B batch   T tokens   S tokens that are looked at   N query heads   K key/value heads   H head width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Where the last `queries` of `total` tokens may look: bool [B or 1, 1, queries, total].

    None stands for everywhere, or for what causal attention means by itself.

    Args:
        window: tokens a token looks back at, itself included.
        document_ids: [B, total]; a token sees its own document.
        keys: bool [B, total]; tokens that are seen at all.
        explicit: whether causality must be in the mask.
    """
    rows: Tensor | None = None
    narrow = window is not None and window < total
    # one query sees all that came before; several, none of them before, are the kernel's own case
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
        if queries > 1:  # what is not seen sees itself: a row without a key has no mean
            own = torch.eye(total, dtype=torch.bool, device=device)[total - queries :]
            seen = seen | own
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
    """softmax(scale q k^T + mask) v: [B, T, N x H]; key/value heads are shared by equal parts."""
    if q_BTNH.shape[1] == 1 and not (q_BTNH.is_cuda or torch.is_grad_enabled()):
        return _attend_once(q_BTNH, k_BKSH, v_BKSH, mask, scale)
    heads, kv_heads = q_BTNH.shape[2], k_BKSH.shape[1]
    shared = heads != kv_heads
    if shared and mask is not None and q_BTNH.is_cuda:
        # the fused GPU kernels that take a mask share no heads; without them [T, T] scores
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
    """`attend` of one query a text on a CPU, where the fused kernel takes four times as long.

    G query heads of a key/value head
    """
    B, _, N, H = q_B1NH.shape
    q_BKGH = q_B1NH.view(B, k_BKSH.shape[1], -1, H) * (H**-0.5 if scale is None else scale)
    scores_BKGS = q_BKGH @ k_BKSH.transpose(-1, -2)
    if mask is not None:  # the same for all heads, or a bias of each
        mask = mask if mask.shape[1] == 1 else mask.view(*q_BKGH.shape[1:3], -1)
        if mask.dtype == torch.bool:
            scores_BKGS = scores_BKGS.masked_fill(~mask, -math.inf)
        else:
            scores_BKGS = scores_BKGS + mask
    return (scores_BKGS.softmax(dim=-1) @ v_BKSH).view(B, 1, N * H)
