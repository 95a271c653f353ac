"""Tensor parallelism: collectives put into a single-device model, where its table says so.

The model is built with the sizes of one rank (`local_model`), so that its mathematics is already
that of a part; what is missing are the sums over the parts (Shoeybi et al. 2019). The table of
shapes names each parameter's split, and the split names the change:

    rows, heads    column-parallel: the input is shared, its gradient summed over the ranks
    columns        row-parallel: the output is summed over the ranks, the bias added after
    vocabulary     of the embedding: ids of other ranks give zero, the sum has all rows;
                   of the head: the fused cross entropy exchanges its row maxima and sums

One all-reduce in the forward and one in the backward for each half of a block.

With sequence parallelism (Korthikanti et al. 2022) each of them becomes a reduce-scatter and an
all-gather along the tokens. From the first block to the last norm a rank then holds its own tokens
alone, so norms, residuals and dropout cost their share of time and memory; the gradients of what
they hold whole (norms, biases) are summed over the ranks inside the backward, before an engine
takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalite import arch
from megalite.config import ModelConfig
from megalite.parallel.collectives import (
    AllTokens,
    ColumnLinear,
    GatherTokens,
    Share,
    Sum,
    SumToTokens,
    TakeTokens,
    start_sum,
)
from megalite.parallel.grid import Grid


class VocabularyShard:
    """One rank's rows of the vocabulary, and what its cross entropy asks of the others.

    Attributes:
        first: the id of the rank's first row.
        held: rows that are tokens; those behind them are padding.
        vocab_size: rows of all ranks that are tokens.
    """

    def __init__(self, vocab_size: int, grid: Grid) -> None:
        rows = -(-vocab_size // grid.mesh.tensor)
        self.vocab_size = vocab_size
        self.first = rows * grid.at.tensor_rank
        self.held = max(0, min(rows, vocab_size - self.first))
        self._group = grid.tensor_group

    def largest(self, values: Tensor) -> Tensor:
        """The elementwise maximum over the ranks, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values

    def total(self, values: Tensor) -> Tensor:
        """The elementwise sum over the ranks, in place."""
        dist.all_reduce(values, group=self._group)
        return values


def local_model(model: ModelConfig, tensor_parallel: int) -> ModelConfig:
    """The configuration whose single-device model is one rank's part of `model`."""
    size = tensor_parallel
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


def split(
    model: Any,
    config: ModelConfig,
    grid: Grid,
    loss: Callable[..., Tensor],
    *,
    sequence: bool = False,
) -> None:
    """Put the collectives into a model built from `local_model`, in place.

    Args:
        model: has `head_loss`, the function its head ends in.
        config: the whole model's configuration.
        loss: `head_loss` with a further argument, the shard of the vocabulary.
        sequence: whether the ranks share the tokens between the collectives as well.
    """
    group = grid.tensor_group
    shard = VocabularyShard(config.vocab_size, grid)
    for row in arch.parameters(config):
        parameter = model.get_parameter(row.name)
        kind = row.tensors[0].split
        # the mark by which DeepSpeed counts a split weight's norm on every rank
        parameter.tensor_model_parallel = kind is not arch.Split.REPLICATED
        owner, _, name = row.name.rpartition(".")
        module = model.get_submodule(owner)
        if kind is arch.Split.REPLICATED:
            if arch.needs_tp_grad_sum(row, sequence=sequence) and parameter.requires_grad:
                parameter.register_hook(partial(_sum_gradient, group))
        elif name != "weight":
            continue
        elif kind in (arch.Split.OUTPUT_DIM, arch.Split.HEADS):
            module.forward = partial(_column_forward, module, group, sequence)
        elif kind is arch.Split.INPUT_DIM and ".layers." in owner:
            module.forward = partial(_row_forward, module, group, sequence)
        elif owner.endswith("embed_tokens"):
            module.forward = partial(_embed, module, shard, group)
    if sequence:
        dropout = bool(config.hidden_dropout or config.attention_dropout)
        enter = partial(_enter, grid, dropout)
        for name in arch.stacks(config):
            model.get_submodule(name).layers[0].register_forward_pre_hook(enter)
    elif config.attention_dropout:
        for block in model.blocks:
            for attention in filter(None, (block.self_attn, block.cross_attn)):
                attention.forward = partial(_own_randomness, attention.forward, grid.at.tensor_rank)
    if sequence:
        model.all_tokens = lambda hidden: AllTokens.apply(hidden, group)
    gather = GatherTokens if sequence else Share

    def parallel_loss(
        hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, **others: Any
    ) -> Tensor:
        return loss(gather.apply(hidden, group), weight, labels, mask, shard, **others)

    model.head_loss = parallel_loss
    model.whole_logits = partial(_whole_logits, config.vocab_size, group)


def _whole_logits(vocab_size: int, group: dist.ProcessGroup, logits: Tensor) -> Tensor:
    """The scores of the whole vocabulary, [..., V], on every rank; no gradient passes."""
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=-1)[..., :vocab_size]


def is_counted(parameter: nn.Parameter, grid: Grid) -> bool:
    """Whether this rank's part of a parameter counts in a sum over the ranks of a model."""
    return grid.at.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)


def _own_randomness(forward: Callable[..., Tensor], rank: int, x: Tensor, *args: Any) -> Tensor:
    """Run a split region on a stream of its own for each rank, and leave the shared one in step.

    Ranks that share a model draw alike, so that replicated dropout is equal on all of them; the
    heads each one holds must not drop alike. The seed comes out of the shared stream, so that a
    recompute, which restores that stream, draws the same again.
    """
    seed = int(torch.randint(1 << 62, ()).item())
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + rank + 1)
        return forward(x, *args)


def _enter(grid: Grid, dropout: bool, block: nn.Module, inputs: Any) -> Any:
    """Before the first block: from all tokens to the rank's own, and to randomness of its own."""
    x_BTD, *others = inputs
    if dropout and block.training:
        # out of the shared stream, which each micro-batch seeds; blocks recompute under their own
        torch.manual_seed(int(torch.randint(1 << 62, ()).item()) + grid.at.tensor_rank + 1)
    return TakeTokens.apply(x_BTD, grid.tensor_group), *others


def _sum_gradient(group: dist.ProcessGroup, grad: Tensor) -> Tensor:
    return start_sum(grad, group)()


def _column_forward(module: Any, group: dist.ProcessGroup, sequence: bool, x_BTD: Tensor) -> Tensor:
    y: Tensor = ColumnLinear.apply(x_BTD, module.weight, group, sequence)
    if module.adapter is not None:
        share = GatherTokens if sequence else Share
        y = y + module.raised(share.apply(module.lowered(x_BTD), group))
    return y if module.bias is None else y + module.bias


def _row_forward(module: Any, group: dist.ProcessGroup, sequence: bool, x_BTF: Tensor) -> Tensor:
    add_up = SumToTokens if sequence else Sum
    y: Tensor = add_up.apply(F.linear(x_BTF, module.weight), group)
    if module.adapter is not None:
        y = y + module.raised(add_up.apply(module.lowered(x_BTF), group))
    return y if module.bias is None else y + module.bias


def _embed(module: Any, shard: VocabularyShard, group: dist.ProcessGroup, index: Tensor) -> Tensor:
    local = index - shard.first
    mine = (local >= 0) & (local < shard.held)
    rows = F.embedding(local.where(mine, 0), module.weight)
    y: Tensor = Sum.apply(rows * mine[..., None], group)
    return y
