"""The mean loss on held-out data: one number whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.data import Batch, Dataset, first_batches
from megalite.engine import Engine
from megalite.formats.tokenizer import Tokenizer
from megalite.parallel import Grid


def mean_loss(
    engine: Engine,
    dataset: Dataset,
    *,
    grid: Grid,
    samples: int,
    micro_batch_size: int,
    stopping: Callable[[], bool] = lambda: False,
) -> float | None:
    """Cross entropy in nats over the unmasked targets of the first `samples` windows.

    Where the data set has fewer windows, over all of them. A collective of all ranks.

    Args:
        stopping: asked before each batch whether to give up, with the same answer on every rank.
    Returns:
        None where it was given up.
    """
    sums = _sum_loss(
        engine.eval_loss,
        dataset,
        samples=samples,
        micro_batch_size=micro_batch_size,
        data_rank=grid.data_rank,
        data_size=grid.data_parallel,
        stopping=stopping,
    )
    if sums is None:
        return None
    dist.all_reduce(sums, group=grid.cpu_group)
    return float(sums[0] / sums[1])


def score(
    loss: Callable[[Batch], Tensor],
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    samples: int,
    micro_batch_size: int,
) -> dict[str, float | int | None]:
    """Loss (nats), perplexity, bits per byte of text and tokens counted, on one device.

    Bits per byte compares models of different tokenizers; null where the targets hold no text.
    """
    samples = min(samples, dataset.windows)
    sums = _sum_loss(
        loss, dataset, samples=samples, micro_batch_size=micro_batch_size, data_rank=0, data_size=1
    )
    assert sums is not None  # nobody asked it to stop
    total, targets = sums.tolist()
    text_bytes = sum(
        tokenizer.count_bytes(labels[mask].tolist())
        for batch in first_batches(
            dataset, samples, micro_batch_size=micro_batch_size, data_rank=0, data_size=1
        )
        for labels, mask in zip(batch.tensors["labels"], batch.tensors["loss_mask"], strict=True)
    )
    return {
        "loss": total / targets,
        "perplexity": perplexity(total / targets),
        "bits_per_byte": total / math.log(2) / text_bytes if text_bytes else None,
        "tokens": int(targets),
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _sum_loss(
    loss: Callable[[Batch], Tensor],
    dataset: Dataset,
    *,
    samples: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    stopping: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """This rank's summed loss and targets: float64 [2] on the CPU; None where it was given up.

    float64, since a sum over millions of targets must keep its digits; on the device until the
    end, so that no batch waits for the one before.
    """
    batches = first_batches(
        dataset,
        min(samples, dataset.windows),
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
    )
    losses, targets = [], 0
    for batch in batches:
        if stopping():
            return None
        losses.append(loss(batch).double())
        targets += batch.targets
    return torch.stack((torch.stack(losses).sum().cpu(), torch.tensor(float(targets)).double()))
