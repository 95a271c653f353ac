"""Tensor and sequence parallelism: `megalite.model.regions` with collectives.

A rank builds the single-device model in the sizes of its part. Only the sums over the parts are
missing (Shoeybi et al. 2019). The regions add them: one all-reduce in the forward and one in the
backward per branch of a block. Ranks divide the vocabulary's rows as well: each looks up and scores
its own tokens.

With sequence parallelism (Korthikanti et al. 2022) each all-reduce becomes a reduce-scatter and an
all-gather along the tokens. From the first block to the last norm a rank then holds only its share
of the tokens. So norms, residuals and dropout take only a share of time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megalite.config import ModelConfig
from megalite.mesh import Coordinate
from megalite.model import ONE_DEVICE, Regions
from megalite.model.matmul import Matmul
from megalite.parallel.collectives import (
    ColumnParallelMatmul,
    copy_to_tp,
    gather_seq,
    gather_seq_replicated,
    reduce_from_tp,
    reduce_scatter_seq,
    scatter_seq,
)
from megalite.parallel.grid import Grid


def make_regions(config: ModelConfig, grid: Grid, *, sequence: bool = False) -> Regions:
    """Return the regions of a model on this rank.

    Args:
        config: configuration of the whole model.
        sequence: whether to use sequence parallelism.
    """
    if grid.at.mesh.tensor == 1:
        return ONE_DEVICE
    kind = SequenceRegions if sequence else TensorRegions
    return kind(config, grid.at, grid.tensor_group)


def shard_config(model: ModelConfig, size: int) -> ModelConfig:
    """Return the configuration of one rank's part of a model that `size` ranks share."""
    if size == 1:
        return model
    return model.model_copy(
        update={
            "vocab_size": -(-model.vocab_size // size),
            "intermediate_size": model.intermediate_size // size,
            "num_attention_heads": model.num_attention_heads // size,
            "num_key_value_heads": model.num_key_value_heads // size,
        }
    )


class RankVocabulary:
    """A rank's rows of the vocabulary, and reductions over the tensor ranks.

    The attributes are those of `megalite.model.loss.VocabularyShard`.
    """

    def __init__(self, vocab_size: int, at: Coordinate, group: dist.ProcessGroup) -> None:
        rows = -(-vocab_size // at.mesh.tensor)
        self.vocab_size = vocab_size
        self.first = rows * at.tensor_rank
        self.unpadded_rows = max(0, min(rows, vocab_size - self.first))
        self._group = group

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over the ranks, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over the ranks, in place."""
        dist.all_reduce(values, group=self._group)
        return values


class TensorRegions(Regions):
    """Regions under tensor parallelism."""

    def __init__(self, config: ModelConfig, at: Coordinate, group: dist.ProcessGroup) -> None:
        self.size = at.mesh.tensor
        self.rank = at.tensor_rank
        self.group = group
        self.vocabulary: RankVocabulary = RankVocabulary(config.vocab_size, at, group)

    def shard_config(self, config: ModelConfig) -> ModelConfig:
        return shard_config(config, self.size)

    def column_linear(self, x: Tensor, weight: Tensor, matmul: Matmul) -> Tensor:
        y: Tensor = ColumnParallelMatmul.apply(x, weight, self.group, False)
        return y

    def copy(self, x: Tensor) -> Tensor:
        return copy_to_tp(x, self.group)

    def reduce(self, x: Tensor) -> Tensor:
        return reduce_from_tp(x, self.group)

    def embed(self, index_BT: Tensor, weight_VD: Tensor) -> Tensor:
        local = index_BT - self.vocabulary.first
        mine = (local >= 0) & (local < self.vocabulary.unpadded_rows)
        rows = F.embedding(local.where(mine, 0), weight_VD)
        return reduce_from_tp(rows * mine[..., None], self.group)

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        parts = [torch.empty_like(logits) for _ in range(self.size)]
        dist.all_gather(parts, logits.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)[..., : self.vocabulary.vocab_size]

    def head_randomness(self, x: Tensor, *, dropout: bool) -> AbstractContextManager[object]:
        return fork_randomness(x.device, self.rank) if dropout else nullcontext()


class SequenceRegions(TensorRegions):
    """Regions under tensor and sequence parallelism."""

    def column_linear(self, x: Tensor, weight: Tensor, matmul: Matmul) -> Tensor:
        y: Tensor = ColumnParallelMatmul.apply(x, weight, self.group, True)
        return y

    def copy(self, x: Tensor) -> Tensor:
        return gather_seq(x, self.group)

    def reduce(self, x: Tensor) -> Tensor:
        return reduce_scatter_seq(x, self.group)

    def scatter(self, x_BTD: Tensor) -> Tensor:
        return scatter_seq(x_BTD, self.group)

    def gather(self, x_BTD: Tensor) -> Tensor:
        return gather_seq_replicated(x_BTD, self.group)

    def block_randomness(self, x: Tensor, *, dropout: bool) -> AbstractContextManager[object]:
        return fork_randomness(x.device, self.rank) if dropout else nullcontext()

    def head_randomness(self, x: Tensor, *, dropout: bool) -> AbstractContextManager[object]:
        return nullcontext()  # `block_randomness` covers the heads


@contextmanager
def fork_randomness(device: torch.device, rank: int) -> Iterator[None]:
    """Draw from a random stream of this rank, and keep the shared stream identical on all ranks.

    Ranks that share a model draw from a shared stream, so that dropout of replicated tensors is
    identical. Dropout of heads or tokens that differ by rank must differ. The rank's seed comes
    from the shared stream, which a recompute restores, so a recompute draws the same numbers.
    """
    seed = int(torch.randint(1 << 62, ()).item())  # from the CPU's stream
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + rank + 1)
        yield
