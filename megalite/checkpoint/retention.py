"""Retention: which checkpoints of a run folder are kept, renamed, replaced or deleted.

A start that has lost its lease changes nothing: `retain`, `set_aside_damaged` and
`clear_leftovers` check the lease that they are given. Check it before `set_aside_later`.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from megalite import files
from megalite.checkpoint.lease import Lease
from megalite.config import CheckpointConfig
from megalite.errors import CheckpointError, MegaLiteError, Superseded
from megalite.formats import checkpoint as disk
from megalite.log import logger
from megalite.parallel import Grid

_REPLACED = ".replaced_"


def retain(root: Path, config: CheckpointConfig, lease: Lease | None = None) -> threading.Thread:
    """Delete the checkpoints that no rule keeps; return the thread that deletes.

    The newest `keep` are kept, those at multiples of `keep_every`, and with `keep_best` the one of
    the lowest validation loss among those that were validated at their step.

    Each checkpoint is renamed first, and the next start deletes those that the thread did not
    reach. A rename that fails is reported and costs only disk space. Without the lease nothing is
    deleted.
    """
    doomed = list[Path]()
    try:
        if lease is not None:
            lease.check()
        for folder in _surplus(root, config):
            with suppress(FileNotFoundError):  # another process has removed it
                doomed.append(folder.rename(folder.with_name(f".deleted_{folder.name}")))
    except Superseded as error:  # only rank 0 is here; the next agreement ends all ranks
        logger.debug("nothing is deleted: %s", error)
    except OSError as error:
        logger.warning("an old checkpoint stays, it cannot be removed: %s", error)
    deletion = threading.Thread(target=lambda: [*map(_remove, doomed)], daemon=True)
    deletion.start()
    return deletion


def publish_or_replace(staging: Path, final: Path) -> None:
    """Publish a checkpoint; one of the same step, left by a run that went back, is replaced.

    The older checkpoint is deleted after the newer one is published. If publishing fails, it is
    restored. After a crash between the two renames, `clear_leftovers` restores it.
    """
    if not final.exists():
        files.publish(staging, final)
        return
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    final.rename(replaced)
    try:
        files.publish(staging, final)
    except BaseException:
        replaced.rename(final)
        raise
    _remove(replaced)


def _surplus(root: Path, config: CheckpointConfig) -> list[Path]:
    folders = disk.published(root)
    kept = set(folders[: config.keep])
    if config.keep_every:
        kept |= {folder for folder in folders if disk.step_of(folder) % config.keep_every == 0}
    if config.keep_best and (best := disk.best(folders)) is not None:
        kept.add(best)
    return [folder for folder in folders if folder not in kept]


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def set_aside_damaged(folders: Iterable[Path], grid: Grid, lease: Lease | None = None) -> None:
    """Rename damaged checkpoints to `bad_...`, so that no start reads them again; a collective.

    A folder that no longer exists is skipped.

    Raises:
        Superseded: on every rank, if a newer start owns the run folder.
        CheckpointError: on every rank, if one cannot be renamed.
    """
    fault: MegaLiteError | None = None
    if grid.rank == 0:
        for folder in folders:
            try:
                if lease is not None:
                    lease.check()
                bad = free_name(folder.parent, folder.name.replace("step_", "bad_", 1))
                folder.rename(bad)
                logger.warning("%s is damaged: set aside as %s", folder, bad.name)
            except Superseded as error:
                fault = error
            except FileNotFoundError:
                logger.warning("%s is gone", folder)
            except OSError as error:
                fault = CheckpointError(f"{folder} is damaged and cannot be set aside: {error}")
    if fault := grid.all_gather_objects(fault)[0]:
        raise fault


def set_aside_later(root: Path, step: int, origin: Path) -> list[str]:
    """Rename checkpoints that are not before `origin`; return their new names.

    The next automatic resume would continue from them otherwise.

    Args:
        step: of `origin`.
        origin: the checkpoint that a run resumes. Another folder of the same step belongs to a
            branch that the run has left.
    """
    names = []
    for folder in disk.published(root):
        if disk.step_of(folder) >= step and folder.resolve() != origin.resolve():
            left = free_name(root, folder.name.replace("step_", "left_", 1))
            folder.rename(left)
            names.append(left.name)
    return names


def free_name(root: Path, name: str) -> Path:
    """Return `root/name`, followed by a number if that name is taken."""
    path = root / name
    count = 1
    while path.exists():
        path = root / f"{name}.{count}"
        count = count + 1
    return path


def clear_leftovers(root: Path, lease: Lease | None = None) -> None:
    """Remove the remains of an interrupted save or deletion; never a published checkpoint.

    Raises:
        Superseded: a newer start owns the run folder, so the remains may be its own.
    """
    if lease is not None:
        lease.check()
    for folder in root.glob(f"{_REPLACED}*"):
        final = folder.with_name(folder.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:  # a crash between two renames
            with suppress(FileNotFoundError):  # an older start that still runs may have restored it
                folder.rename(final)
    for pattern in (".staging_*", ".deleted_*"):
        for path in root.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    files.clear_partials(root)
