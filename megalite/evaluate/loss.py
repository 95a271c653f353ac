"""The mean loss on held-out data: one number whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalite.config import DataConfig, RunConfig, SourceConfig, parse_config
from megalite.data import Batch, Count, Dataset, Samples, first_batches, open_valid, set_corruption
from megalite.engine import Engine
from megalite.errors import CommandError
from megalite.evaluate.loading import LoadedModel
from megalite.observe.progress import report_calls
from megalite.parallel import Grid


def mean_loss(
    engine: Engine,
    dataset: Samples,
    *,
    grid: Grid,
    samples: int,
    micro_batch_size: int,
    stopping: Callable[[], bool] = lambda: False,
) -> float | None:
    """Return the cross entropy in nats per unmasked target of the first `samples` samples.

    If the data set has fewer samples, all of them count. A collective of all ranks.

    Args:
        stopping: called before each batch; returns whether to give up, the same on every rank.
    Returns:
        None if it was given up.
    """
    sums = sum_loss(
        engine.eval_loss,
        dataset,
        samples=samples,
        micro_batch_size=micro_batch_size,
        data_rank=grid.at.data_rank,
        data_size=grid.mesh.data,
        stopping=stopping,
        count=engine.objective.count,
    )
    if sums is None:
        return None
    grid.sum_once(sums)
    return float(sums[0] / sums[1])


def score_data(
    loaded: LoadedModel, grid: Grid, *, data: str | None, micro_batch_size: int
) -> dict[str, float | int | None]:
    """Return loss (nats), perplexity, bits per byte of text and counted tokens, over all ranks.

    Bits per byte compares models of different tokenizers. It is null if the targets are not
    continued text. A model of masked tokens also has `accuracy`: the share of targets it predicts.

    Args:
        data: a shard folder; None: the run file's `data.valid`.
    Raises:
        CommandError: no shards, or those of another tokenizer.
    """
    run = loaded.run or _run_of(loaded)
    dataset = _open_held_out(loaded, run, data)
    batches = partial(
        first_batches,
        dataset,
        dataset.num_samples,
        micro_batch_size=micro_batch_size,
        data_rank=grid.at.data_rank,
        data_size=grid.mesh.data,
    )
    sums = torch.zeros(2, dtype=torch.float64)
    text_bytes = 0
    right = 0
    count = -(-dataset.num_samples // (micro_batch_size * grid.mesh.data))
    length = run.data.sequence_length
    loss_of = report_calls(
        loaded.loss,
        total=count,
        what=f"eval on {dataset.num_samples:,} samples of {length:,} tokens",
    )
    masked, causal = (run.objective.name == name for name in ("masked", "causal"))
    for batch in batches():
        sums += torch.stack((loss_of(batch).double().cpu(), torch.tensor(batch.targets)))
        if masked:
            right += loaded.count_correct(batch)
        if causal:
            labels = batch.tensors["labels"]
            mask = batch.tensors["loss_mask"]
            text_bytes += sum(
                loaded.tokenizer.count_bytes(row[seen].tolist())
                for row, seen in zip(labels, mask, strict=True)
            )
    totals = torch.cat((sums, torch.tensor([text_bytes, right], dtype=torch.float64)))
    total, targets, text_bytes, right = grid.sum_once(totals).tolist()
    found = {
        "loss": total / targets,
        "perplexity": perplexity(total / targets),
        "bits_per_byte": total / math.log(2) / text_bytes if text_bytes else None,
        "tokens": round(targets),
    }
    return found | ({"accuracy": right / targets} if masked else {})


def _open_held_out(loaded: LoadedModel, run: RunConfig, data: str | None) -> Dataset:
    """Open the shards to measure on, prepared for the run's objective.

    Raises:
        CommandError: no shards, or those of another tokenizer.
    """
    section = run.data.model_dump()
    if data:
        section["valid"] = (SourceConfig(path=data),)
    dataset = open_valid(DataConfig(**section), vocab_size=loaded.config.vocab_size)
    if dataset is None:
        raise CommandError("no run file names data.valid; name shards with --data DIR")
    if loaded.tokenizer_sha256 and dataset.tokenizer_sha256 not in ("", loaded.tokenizer_sha256):
        raise CommandError(
            f"{dataset.sources[0].folder} was made with another tokenizer than the model's; "
            f"tokenize it again with --tokenizer {loaded.folder / 'tokenizer'}"
        )
    set_corruption(dataset, run)
    return dataset


def _run_of(loaded: LoadedModel) -> RunConfig:
    """Return a run file for a folder that has none: the model, and windows as long as it reads."""
    model = loaded.config
    objective = dict[str, Any]()
    if model.architecture == "encoder":
        pieces = loaded.tokenizer.pieces()
        ids = [pieces.index(name) for name in ("[MASK]", "<mask>") if name in pieces]
        objective = {"objective": {"name": "masked", "mask_token_id": ids[0] if ids else None}}
    return parse_config(
        {
            "name": "evaluation",
            "model": model.model_dump(mode="json"),
            "data": {
                "train": [{"path": "-"}],
                "sequence_length": min(model.max_position_embeddings, 2048),
            },
            "optimizer": {"lr": 1.0},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            **objective,
        }
    )


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def sum_loss(
    loss: Callable[[Batch], Tensor],
    dataset: Samples,
    *,
    samples: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    stopping: Callable[[], bool] = lambda: False,
    count: Count | None = None,
) -> Tensor | None:
    """Return this rank's summed loss and targets: float64 [2] on the CPU; None if it was given up.

    float64 keeps the digits of a sum over millions of targets. The sum stays on the device until
    the end, so that no batch waits for the one before.
    """
    batches = first_batches(
        dataset,
        min(samples, dataset.num_samples),
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        count=count,
    )
    losses = []
    targets = 0
    for batch in batches:
        if stopping():
            return None
        losses.append(loss(batch).double())
        targets += batch.targets
    return torch.stack((torch.stack(losses).sum().cpu(), torch.tensor(float(targets)).double()))
