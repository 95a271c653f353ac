"""The run folder: its contents at the start, and the right to write into it."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megalite import checkpoint, files, log
from megalite.checkpoint import Lease
from megalite.config import RunConfig
from megalite.data import Samples
from megalite.errors import CommandError, DataError, MegaLiteError, Superseded
from megalite.formats import checkpoint as disk
from megalite.log import logger
from megalite.observe import Recorder, overwrite_status, previous_attempts
from megalite.parallel import Grid
from megalite.tokenizers.tokenizer import copy_generation_config, tokenizer_files
from megalite.train.outcome import end_state
from megalite.train.resume import ResumePoint

_TRIES = 3


@contextmanager
def open_run_folder(
    folder: Path,
    *,
    config: RunConfig,
    grid: Grid,
    settings: Mapping[str, Any],
    train: Samples,
    resume_point: ResumePoint | None,
    lease: Lease | None = None,
) -> Iterator[Recorder]:
    """Open the run folder on rank 0, and yield the writer of its records.

    Args:
        settings: DeepSpeed's JSON of this run.
        lease: rank 0's right to write.
    Raises:
        CommandError: on every rank, if the folder cannot be written.
        Superseded: on every rank, if a newer start owns the folder.
        MegaLiteError: on every rank, if rank 0 fails in another way. status.json says failed.
    """
    checkpoint.set_aside_damaged(resume_point.damaged if resume_point else (), grid, lease)
    handler = None
    attempt = 0
    fault: MegaLiteError | None = None
    if grid.rank == 0:
        try:
            attempt = _prepare(
                folder,
                config=config,
                settings=settings,
                train=train,
                resume_point=resume_point,
                lease=lease,
            )
            handler = log.add_file(folder / "log.txt")
        except (OSError, shutil.Error) as error:
            fault = _refusal(folder, error, lease)
        except Superseded as error:
            fault = error
        except Exception as error:  # of any kind, because the other ranks wait for the result
            fault = _failed(folder, error)
    attempt, fault = grid.all_gather_objects((attempt, fault))[0]
    if fault:
        raise fault
    recorder = Recorder(
        folder,
        rank=grid.rank,
        attempt=attempt,
        total_steps=config.training.steps,
        tensorboard=config.logging.tensorboard,
        wandb=config.logging.wandb,
        sinks=config.logging.sinks,
    )
    try:
        yield recorder
    finally:
        recorder.close()
        log.remove(handler)


def take_over(folder: Path, grid: Grid) -> Lease | None:
    """Take the lease of the run folder, and clear leftovers of killed starts; a collective.

    Returns:
        rank 0's lease. None on the other ranks.
    Raises:
        CommandError: on every rank, if the folder cannot be written.
        Superseded: on every rank, if a newer start has taken the lease meanwhile.
    """
    root = folder / "checkpoints"
    lease = checkpoint.take_lease(root, grid)
    fault: MegaLiteError | None = None
    if lease is not None:
        try:
            checkpoint.clear_leftovers(root, lease)
        except OSError as error:
            fault = _refusal(folder, error, lease)
        except Superseded as error:
            fault = error
    fault = grid.all_gather_objects(fault)[0]
    if fault:
        raise fault
    return lease


def listing(root: Path, grid: Grid) -> list[tuple[str, int, int]]:
    """Return the published checkpoints with inode and time of their manifests, by rank 0's view.

    If two listings are equal, no checkpoint has changed in between.
    """
    checkpoints = list[tuple[str, int, int]]()
    if grid.rank == 0:
        for path in disk.published(root):
            with suppress(OSError):
                stat = (path / disk.MANIFEST).stat()
                checkpoints.append((path.name, stat.st_ino, stat.st_mtime_ns))
    return list(grid.all_gather_objects(checkpoints)[0])


def _refusal(folder: Path, error: Exception, lease: Lease | None) -> MegaLiteError:
    """Return the error for a folder that cannot be written: Superseded, or else CommandError."""
    try:
        if lease is not None:
            lease.check()
    except Superseded as superseded:
        return superseded
    return CommandError(
        f"the run folder {folder} cannot be written: {error}; name another directory"
    )


def _failed(folder: Path, error: Exception) -> MegaLiteError:
    """Record in status.json that the folder could not be prepared. Return the error to raise."""
    logger.debug("the run folder %s", folder, exc_info=error)
    cause = str(error) if isinstance(error, MegaLiteError) else f"{type(error).__name__}: {error}"
    fault = MegaLiteError(f"the run folder {folder} cannot be prepared: {cause}")
    attempt = previous_attempts(folder)
    overwrite_status(folder, "failed", reason=end_state(fault)[1], attempt=attempt)
    return fault


def check_folders(folder: Path, train: Samples, grid: Grid) -> None:
    """Refuse a run folder of another kind, and a tokenizer folder that cannot be copied.

    Raises:
        CommandError: on every rank, by rank 0's view.
    """
    fault = grid.all_gather_objects(_kind_fault(folder) or _tokenizer_fault(train))[0]
    if fault:
        raise CommandError(fault)


def _tokenizer_fault(train: Samples) -> str | None:
    """Return why the tokenizer of the data cannot be copied, or None."""
    try:
        if train.tokenizer_folder is not None:
            tokenizer_files(train.tokenizer_folder)
    except (OSError, DataError) as error:
        return str(error)
    return None


def _kind_fault(folder: Path) -> str | None:
    """Return an error for folders in place of the run's files, or files in place of folders."""
    names = ("config.json", "deepspeed.json", "log.txt", "metrics.jsonl", "status.json")
    wrong = [
        path
        for path in (*(folder / name for name in names), folder / "checkpoints" / ".lease.json")
        if path.is_dir()
    ]
    for name in ("", "checkpoints", "tokenizer", "tensorboard", "profile"):
        path = folder / name
        if path.exists() and not path.is_dir():
            wrong.append(path)
    if not wrong:
        return None
    kinds = ", ".join(f"{path} is a {'folder' if path.is_dir() else 'file'}" for path in wrong)
    return f"{kinds}, but a run needs the opposite: move it away, or name another directory"


def _prepare(
    folder: Path,
    *,
    config: RunConfig,
    settings: Mapping[str, Any],
    train: Samples,
    resume_point: ResumePoint | None,
    lease: Lease | None,
) -> int:
    """Write the initial files of a run folder. Return the number of this attempt."""
    attempt = previous_attempts(folder)
    root = folder / "checkpoints"
    if lease is not None:
        lease.check()
    files.clear_partials(folder)
    files.write_json(folder / "config.json", config.model_dump(mode="json"))
    files.write_json(folder / "deepspeed.json", settings)
    _copy_tokenizer(train, folder / "tokenizer")
    if resume_point is not None:
        copy_generation_config(folder / "tokenizer", resume_point.folder)
    newer = []
    if resume_point is not None and not resume_point.weights_only:
        newer = checkpoint.set_aside_newer(root, resume_point.progress.step, resume_point.folder)
    if newer:
        logger.info("resuming from an earlier step; set aside: %s", ", ".join(newer))
    return attempt


def _copy_tokenizer(train: Samples, target: Path) -> None:
    """Replace `target` by the tokenizer of the data, even if another start does the same."""
    for leftover in target.parent.glob(f".{target.name}.*"):  # of a start that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        partial.mkdir()
        if train.tokenizer_folder is not None:  # Megatron's shards may have no tokenizer
            for path in tokenizer_files(train.tokenizer_folder):
                shutil.copyfile(path, partial / path.name)
        for tries_left in reversed(range(_TRIES)):
            shutil.rmtree(target, ignore_errors=True)
            try:
                partial.rename(target)
                return
            except OSError:  # another start has created `target`
                if not tries_left:
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
