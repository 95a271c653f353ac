"""The mean loss on held-out data: one number whatever the layout."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalite.data import Dataset, first_batches
from megalite.engine import Engine
from megalite.parallel import Grid


def mean_loss(
    engine: Engine, dataset: Dataset, *, grid: Grid, samples: int, micro_batch_size: int
) -> float:
    """Cross entropy in nats over the unmasked targets of the first `samples` windows.

    Where the data set has fewer windows, over all of them. A collective of all ranks.
    """
    batches = first_batches(
        dataset,
        min(samples, dataset.windows),
        micro_batch_size=micro_batch_size,
        data_rank=grid.data_rank,
        data_size=grid.data_parallel,
    )
    # float64: a sum over millions of targets keeps its digits; on the device, so no step waits
    total = torch.zeros((), dtype=torch.float64, device=grid.device)
    targets = 0
    for batch in batches:
        total += engine.eval_loss(batch).double()
        targets += batch.targets
    sums = torch.stack((total.cpu(), torch.tensor(float(targets), dtype=torch.float64)))
    dist.all_reduce(sums, group=grid.cpu_group)
    return float(sums[0] / sums[1])
