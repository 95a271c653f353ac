"""A run's folder: what it holds from the start, and who may write into it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalite import checkpoint, files, log
from megalite.config import RunConfig
from megalite.data import Samples
from megalite.errors import CommandError, DataError
from megalite.formats.tokenizer import keep_ends, tokenizer_files
from megalite.log import logger
from megalite.observe import Recorder, previous_attempts
from megalite.parallel import Grid
from megalite.train.resume import Origin


@contextmanager
def opened(
    folder: Path,
    config: RunConfig,
    grid: Grid,
    settings: Mapping[str, Any],
    train: Samples,
    origin: Origin | None,
) -> Iterator[Recorder]:
    """The run folder, opened by rank 0, and the writer of its records.

    Args:
        settings: DeepSpeed's JSON of this run.
    Raises:
        CommandError: on every rank, where it cannot be written.
    """
    if fault := grid.gather(_other_kinds(folder) or _links(train))[0]:
        raise CommandError(fault)
    checkpoint.set_aside_damaged(origin.damaged if origin else (), grid)
    handler, attempt = None, 0
    if grid.rank == 0:
        try:
            attempt = _prepare(folder, config, settings, train, origin)
            handler = log.add_file(folder / "log.txt")
        except (OSError, shutil.Error) as error:
            fault = f"the run folder {folder} cannot be written: {error}; name another directory"
    attempt, fault = grid.gather((attempt, fault))[0]
    if fault:
        raise CommandError(fault)
    recorder = Recorder(
        folder,
        rank=grid.rank,
        attempt=attempt,
        total_steps=config.training.steps,
        tensorboard=config.logging.tensorboard,
        wandb=config.logging.wandb,
    )
    try:
        yield recorder
    finally:
        recorder.close()
        log.remove(handler)


def _links(train: Samples) -> str | None:
    """What keeps the tokenizer of the data from being copied."""
    try:
        if train.tokenizer_folder is not None:
            tokenizer_files(train.tokenizer_folder)
    except (OSError, DataError) as error:
        return str(error)
    return None


def _other_kinds(folder: Path) -> str | None:
    """What of a run folder is a folder where a file belongs, or the other way about."""
    own = ("config.json", "deepspeed.json", "log.txt", "metrics.jsonl", "status.json")
    wrong = [
        path
        for path in (*(folder / name for name in own), folder / "checkpoints" / ".lease.json")
        if path.is_dir()
    ]
    for name in ("", "checkpoints", "tokenizer", "tensorboard", "profile"):
        if (path := folder / name).exists() and not path.is_dir():
            wrong.append(path)
    if not wrong:
        return None
    kinds = ", ".join(f"{path} is a {'folder' if path.is_dir() else 'file'}" for path in wrong)
    return f"{kinds}, where a run keeps the other: move it away, or name another directory"


def _prepare(
    folder: Path,
    config: RunConfig,
    settings: Mapping[str, Any],
    train: Samples,
    origin: Origin | None,
) -> int:
    """Write what a run folder holds from the start; returns the number of this attempt."""
    attempt, root = previous_attempts(folder), folder / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    checkpoint.clear_leftovers(root)
    files.clear_partials(folder)
    files.write_json(folder / "config.json", config.model_dump(mode="json"))
    files.write_json(folder / "deepspeed.json", settings)
    # nothing of another start's tokenizer may stay behind in it
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    (folder / "tokenizer").mkdir()
    if train.tokenizer_folder is not None:  # Megatron's shards may lack one
        for path in tokenizer_files(train.tokenizer_folder):
            shutil.copyfile(path, folder / "tokenizer" / path.name)
    if origin is not None:
        keep_ends(folder / "tokenizer", origin.folder)
    left = []
    if origin is not None and not origin.weights_only:
        left = checkpoint.set_aside_later(root, origin.place.step)
    if left:
        logger.info("going on from an earlier step; set aside: %s", ", ".join(left))
    return attempt
