"""Linear layers with low-rank adapters, and embeddings.

Parameters are created empty; `megalite.model.init` fills them. Weights are [out, in]. Projections
of the same input are one parameter in memory (qkv_proj, gate_up_proj), because one large product is
faster than several small ones. `megalite.arch` maps them to the separate tensors of checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config import AdapterConfig, ModelConfig
from megalite.model.matmul import Matmul, matmul, to_column_major
from megalite.model.regions import Regions


class Linear(nn.Module):
    """`x @ weight.T (+ bias)` with an uninitialised weight [out, in].

    An adapter adds `scale B (A x)` (LoRA, Hu et al. 2021). The adapter of a fused projection stacks
    an A and a B for each adapted part.

    Args:
        adapter: the adapter's configuration. None means no adapter.
        parts: number of output rows of each projection that is fused in the layer, by name.
    """

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
        self._parts = dict(parts or {})
        adapted = {n: size for n, size in self._parts.items() if adapter and n in adapter.targets}
        self._adapted = adapted
        self.adapter = adapter if adapted else None
        if self.adapter is not None:
            rank = self.adapter.rank
            self.lora_A = nn.Parameter(torch.empty(len(adapted) * rank, in_features))
            self.lora_B = nn.Parameter(torch.empty(sum(adapted.values()), rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._matmul: Matmul = matmul

    def forward(self, x: Tensor) -> Tensor:
        y = self._matmul(x, self.weight)
        if self.adapter is not None:
            y = y + self.lora_up(self.lora_down(x))
        return self._add_bias(y)

    def lora_down(self, x: Tensor) -> Tensor:
        """Return A x of every adapted part: [..., in] -> [..., parts x rank]."""
        assert self.adapter is not None
        return F.linear(F.dropout(x, self.adapter.dropout, self.training), self.lora_A)

    def lora_up(self, low: Tensor) -> Tensor:
        """Return `scale B low` of every part, zero if not adapted: -> [..., out].

        Args:
            low: the output of `lora_down`.
        """
        assert self.adapter is not None
        lows = iter(low.chunk(len(self._adapted), dim=-1))
        factors = iter(self.lora_B.split(list(self._adapted.values())))
        added = [
            F.linear(next(lows), next(factors)) if name in self._adapted else low.new_zeros(())
            for name in self._parts
        ]
        shapes = [(*low.shape[:-1], size) for size in self._parts.values()]
        whole = [part.expand(shape) for part, shape in zip(added, shapes, strict=True)]
        return self.adapter.scale * torch.cat(whole, dim=-1)

    def prepare_for_decoding(self, product: Matmul) -> None:
        """Store the weight column-major, and use `product` from now on."""
        to_column_major(self.weight)
        self._matmul = product

    def _add_bias(self, y: Tensor) -> Tensor:
        # F.linear would not do: DeepSpeed's version for ZeRO-3 (runtime/zero/linear.py) adds the
        # bias in place, and selective recompute would add it twice.
        return y if self.bias is None else y + self.bias


class _SharedLinear(Linear):
    """A projection of a block, which the tensor ranks share.

    Args:
        parts: number of this rank's output rows of each projection, by name.
    """

    def __init__(
        self, config: ModelConfig, regions: Regions, in_features: int, *, bias: bool, **parts: int
    ) -> None:
        rows = sum(parts.values())
        super().__init__(in_features, rows, bias=bias, adapter=config.adapter, parts=parts)
        self.regions = regions


class ColumnLinear(_SharedLinear):
    """A column-parallel projection: each rank computes some outputs (Shoeybi et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.regions.column_linear(x, self.weight, self._matmul)
        if self.adapter is not None:
            y = y + self.lora_up(self.regions.copy(self.lora_down(x)))
        return self._add_bias(y)


class RowLinear(_SharedLinear):
    """A row-parallel projection: each rank has some inputs (Shoeybi et al. 2019).

    The ranks sum their outputs. The bias is added after the sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = self.regions.reduce(self._matmul(x, self.weight))
        if self.adapter is not None:
            y = y + self.lora_up(self.regions.reduce(self.lora_down(x)))
        return self._add_bias(y)


class Embedding(nn.Module):
    """An embedding table without initial values: [B, T] -> [B, T, D]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, index_BT: Tensor) -> Tensor:
        return F.embedding(index_BT, self.weight)


class VocabularyEmbedding(Embedding):
    """The token embeddings, whose rows the tensor ranks share."""

    def __init__(self, config: ModelConfig, regions: Regions) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.regions = regions

    def forward(self, index_BT: Tensor) -> Tensor:
        return self.regions.embed(index_BT, self.weight)
