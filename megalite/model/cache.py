"""The KV cache: keys and values of the tokens so far, in memory that is allocated once.

B batch   T tokens   K key/value heads   H head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.config import ModelConfig


class LayerCache:
    """Keys and values of one block, [B, K, T, H].

    Attributes:
        length: number of tokens so far.
        memory: keys and values of the encoder's text, if any.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)
        self.length = 0
        self.memory: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the next tokens. Return the keys and values of all tokens."""
        end = self.length + keys.shape[2]
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class Cache:
    """The caches of a stack's blocks.

    Args:
        config: configuration of this rank's part (`LanguageModel.config`).
        tokens: capacity in tokens per text.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        *,
        batch: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(layers)]
        self.length = 0
