"""Points of a model at which ranks that share it exchange data. On one device they do nothing.

A module calls its regions at the places of the sums and gathers, so that its own forward shows
all of them. `megalite.parallel.regions` implements the same interface over ranks.

B batch   T tokens   D width   V vocabulary
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.nn.functional as F
from torch import Tensor

from megalite.config import ModelConfig
from megalite.model.loss import VocabularyShard
from megalite.model.matmul import Matmul


class Regions:
    """The regions of a model on one device.

    Attributes:
        size: the number of ranks that share the model.
        vocabulary: the rows of the vocabulary that this rank holds. None means all rows.
    """

    size: int = 1
    vocabulary: VocabularyShard | None = None

    def shard_config(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration of this rank's part of a model."""
        return config

    def column_linear(self, x: Tensor, weight: Tensor, matmul: Matmul) -> Tensor:
        """Multiply with a weight whose outputs the ranks share: [..., in] -> [..., out].

        It is `matmul(copy(x), weight)`. Ranks compute it as one function, in whose backward the
        sum of the input's gradients travels while the weight's gradient is computed.
        """
        return matmul(x, weight)

    def copy(self, x: Tensor) -> Tensor:
        """Enter a part of the model in which every rank computes with all of `x`."""
        return x

    def reduce(self, x: Tensor) -> Tensor:
        """Leave such a part: sum over the ranks what each of them computed."""
        return x

    def scatter(self, x_BTD: Tensor) -> Tensor:
        """Enter the blocks, between whose products the ranks may share the tokens."""
        return x_BTD

    def gather(self, x_BTD: Tensor) -> Tensor:
        """Return the hidden states of all tokens, with which every rank goes on identically."""
        return x_BTD

    def embed(self, index_BT: Tensor, weight_VD: Tensor) -> Tensor:
        """Look up rows of the vocabulary, which the ranks may share: [B, T] -> [B, T, D]."""
        return F.embedding(index_BT, weight_VD)

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary, [..., V], without a gradient."""
        return logits

    def block_randomness(self, x: Tensor, *, dropout: bool) -> AbstractContextManager[object]:
        """Return a context in which the blocks of ranks that share the tokens draw differently.

        Args:
            x: a tensor on the device that draws.
            dropout: whether random numbers are drawn.
        """
        return nullcontext()

    def head_randomness(self, x: Tensor, *, dropout: bool) -> AbstractContextManager[object]:
        """Return a context in which each rank's heads draw random numbers of their own.

        Args:
            x: a tensor on the device that draws.
            dropout: whether random numbers are drawn.
        """
        return nullcontext()


ONE_DEVICE = Regions()
