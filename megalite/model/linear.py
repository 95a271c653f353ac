"""Linear layers with low-rank adapters, and embeddings.

Parameters are created empty; `megalite.model.init` fills them. Weights are [out, in]. Projections
that read the same input are one parameter in memory (qkv_proj, gate_up_proj): one large product is
faster than two or three small ones. `megalite.arch` maps them to the separate tensors that
checkpoints hold.
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

    An adapter adds `scale B (A x)` (LoRA, Hu et al. 2021). The adapter of a fused projection has
    an A and a B for each part that is adapted, stacked.

    Args:
        adapter: the adapter's configuration. None means that the layer has none.
        parts: the number of output rows of each projection that is fused in the layer, by name.
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
        """Compute A x of every adapted part: [..., in] -> [..., parts x rank]."""
        assert self.adapter is not None
        return F.linear(F.dropout(x, self.adapter.dropout, self.training), self.lora_A)

    def lora_up(self, low: Tensor) -> Tensor:
        """Compute what the adapter adds from the output of `lora_down`: -> [..., out]."""
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
        """Use `product` from now on, and store the weight as products of few rows read it."""
        to_column_major(self.weight)
        self._matmul = product

    def _add_bias(self, y: Tensor) -> Tensor:
        # not by F.linear: DeepSpeed's version for ZeRO-3 (runtime/zero/linear.py) adds the bias in
        # place, which selective recompute would repeat
        return y if self.bias is None else y + self.bias


class _SharedLinear(Linear):
    """A projection of a block, which the ranks of its regions share.

    Args:
        parts: the number of this rank's output rows of each projection, by name.
    """

    def __init__(
        self, config: ModelConfig, regions: Regions, in_features: int, *, bias: bool, **parts: int
    ) -> None:
        rows = sum(parts.values())
        super().__init__(in_features, rows, bias=bias, adapter=config.adapter, parts=parts)
        self.regions = regions


class ColumnLinear(_SharedLinear):
    """A projection whose outputs the ranks share (column-parallel, Shoeybi et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.regions.column_linear(x, self.weight, self._matmul)
        if self.adapter is not None:
            y = y + self.lora_up(self.regions.copy(self.lora_down(x)))
        return self._add_bias(y)


class RowLinear(_SharedLinear):
    """A projection whose inputs the ranks share (row-parallel, Shoeybi et al. 2019).

    Each rank has all output rows. The bias is added after the sum over the ranks.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = self.regions.reduce(self._matmul(x, self.weight))
        if self.adapter is not None:
            y = y + self.lora_up(self.regions.reduce(self.lora_down(x)))
        return self._add_bias(y)


class Embedding(nn.Module):
    """Rows of a table, chosen by index: [B, T] -> [B, T, D]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, index_BT: Tensor) -> Tensor:
        return F.embedding(index_BT, self.weight)


class VocabularyEmbedding(Embedding):
    """The embeddings of tokens, whose rows the ranks may share."""

    def __init__(self, config: ModelConfig, regions: Regions) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.regions = regions

    def forward(self, index_BT: Tensor) -> Tensor:
        return self.regions.embed(index_BT, self.weight)
