"""Points of a model at which tensor ranks exchange data. On one device they do nothing.

A module calls its regions at each sum or gather over ranks, so its forward shows all exchanges.
`megalite.parallel.regions` implements the same interface with collectives.

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
        size: number of ranks that share the model.
        vocabulary: rows of the vocabulary that this rank holds. None means all rows.
    """

    size: int = 1
    vocabulary: VocabularyShard | None = None

    def shard_config(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration of this rank's part of a model."""
        return config

    def column_linear(self, x: Tensor, weight: Tensor, matmul: Matmul) -> Tensor:
        """Return `matmul(copy(x), weight)`, column-parallel: [..., in] -> [..., out].

        With several ranks it is one autograd function. Its backward overlaps the all-reduce of the
        input's gradient with the computation of the weight's gradient.
        """
        return matmul(x, weight)

    def copy(self, x: Tensor) -> Tensor:
        """Begin a tensor-parallel part: every rank uses all of `x`."""
        return x

    def reduce(self, x: Tensor) -> Tensor:
        """End a tensor-parallel part: sum the results of all ranks."""
        return x

    def scatter(self, x_BTD: Tensor) -> Tensor:
        """Begin the blocks: under sequence parallelism, keep this rank's tokens."""
        return x_BTD

    def gather(self, x_BTD: Tensor) -> Tensor:
        """End the blocks: return the hidden states of all tokens on every rank."""
        return x_BTD

    def embed(self, index_BT: Tensor, weight_VD: Tensor) -> Tensor:
        """Look up token embeddings, whose rows the ranks may share: [B, T] -> [B, T, D]."""
        return F.embedding(index_BT, weight_VD)

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary, [..., V], without a gradient."""
        return logits

    def block_randomness(self, x: Tensor, *, dropout: bool) -> AbstractContextManager[object]:
        """Return a context for the blocks' dropout.

        If ranks share the tokens, they draw different numbers in it.

        Args:
            x: a tensor on the device that draws.
            dropout: whether random numbers are drawn.
        """
        return nullcontext()

    def head_randomness(self, x: Tensor, *, dropout: bool) -> AbstractContextManager[object]:
        """Return a context for the attention heads' dropout. Ranks draw different numbers in it.

        Args:
            x: a tensor on the device that draws.
            dropout: whether random numbers are drawn.
        """
        return nullcontext()


ONE_DEVICE = Regions()
