"""The mean loss on held-out data, which does not depend on the layout."""

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
    """Return the mean cross entropy (nats) of the first `samples` samples; a collective.

    If the data set has fewer samples, all of them are used.

    Args:
        stopping: called before each batch. It returns whether to give up, the same on every rank.
    Returns:
        the mean over unmasked targets. None if the evaluation was given up.
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
    """Return loss (nats), perplexity, bits per byte of text and tokens, over all ranks.

    Bits per byte allows a comparison of models with different tokenizers. It is None unless the
    objective is causal. A masked language model also has `accuracy`.

    Args:
        data: a shard folder. None means the run file's `data.valid`.
    Raises:
        CommandError: there are no shards, or they were made with another tokenizer.
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
    correct = 0
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
            correct += loaded.count_correct(batch)
        if causal:
            labels = batch.tensors["labels"]
            mask = batch.tensors["loss_mask"]
            text_bytes += sum(
                loaded.tokenizer.count_bytes(row[counts].tolist())
                for row, counts in zip(labels, mask, strict=True)
            )
    totals = torch.cat((sums, torch.tensor([text_bytes, correct], dtype=torch.float64)))
    total, targets, text_bytes, correct = grid.sum_once(totals).tolist()
    metrics = {
        "loss": total / targets,
        "perplexity": perplexity(total / targets),
        "bits_per_byte": total / math.log(2) / text_bytes if text_bytes else None,
        "tokens": round(targets),
    }
    return metrics | ({"accuracy": correct / targets} if masked else {})


def _open_held_out(loaded: LoadedModel, run: RunConfig, data: str | None) -> Dataset:
    """Open the held-out shards, prepared for the run's objective.

    Raises:
        CommandError: there are no shards, or they were made with another tokenizer.
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
    """Return a run file for a folder without one, with samples of the model's window length."""
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
    """Return this rank's summed loss and targets: float64 [2] on the CPU, or None if given up.

    float64 keeps the precision of a sum over millions of targets. The losses stay on the device
    until the end, so that batches do not wait for each other.
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
