"""Retention: the functions that rename, replace and delete checkpoints of a run folder.

A start that has lost its lease must change nothing. `retain`, `set_aside_damaged` and
`clear_leftovers` check the lease. Call `Saver.check_lease` or `Lease.check` before
`set_aside_newer`.
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
    """Delete the checkpoints that no rule keeps, in a thread that is returned.

    The rules keep the newest `keep` checkpoints, those at multiples of `keep_every`, and with
    `keep_best` the one with the lowest validation loss.

    Each checkpoint is renamed first. If the run ends before the thread is done, the next start
    deletes the rest. A rename that fails is logged. Without the lease nothing is deleted.
    """
    renamed = list[Path]()
    try:
        if lease is not None:
            lease.check()
        for folder in _surplus(root, config):
            with suppress(FileNotFoundError):  # another process has removed it
                renamed.append(folder.rename(folder.with_name(f".deleted_{folder.name}")))
    except Superseded as error:  # only rank 0 is here; the saver ends all ranks
        logger.debug("nothing is deleted: %s", error)
    except OSError as error:
        logger.warning("an old checkpoint stays, it cannot be removed: %s", error)
    deletion = threading.Thread(target=lambda: [*map(_remove, renamed)], daemon=True)
    deletion.start()
    return deletion


def publish_or_replace(staging: Path, final: Path) -> None:
    """Publish a checkpoint in place of an older one of the same step, if there is one.

    A run that went back to an earlier checkpoint reaches a step twice. The older checkpoint is
    deleted after the newer one is published, and restored if publishing fails. After a crash
    between the two renames, `clear_leftovers` restores it.
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
    retained = set(folders[: config.keep])
    if config.keep_every:
        retained |= {folder for folder in folders if disk.step_of(folder) % config.keep_every == 0}
    if config.keep_best and (best := disk.best(folders)) is not None:
        retained.add(best)
    return [folder for folder in folders if folder not in retained]


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def set_aside_damaged(folders: Iterable[Path], grid: Grid, lease: Lease | None = None) -> None:
    """Rename damaged checkpoints to `bad_...`, so that no start reads them again; a collective.

    Folders that no longer exist are skipped.

    Raises:
        Superseded: on every rank, if a newer start owns the run folder.
        CheckpointError: on every rank, if a folder cannot be renamed.
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
                fault = CheckpointError(
                    f"{folder} is damaged and cannot be renamed: {error}; remove it"
                )
    if fault := grid.all_gather_objects(fault)[0]:
        raise fault


def set_aside_newer(root: Path, step: int, origin: Path) -> list[str]:
    """Rename the checkpoints that are newer than `origin` to `left_...`; return their new names.

    Otherwise the next automatic resume would continue from them.

    Args:
        step: the step of `origin`.
        origin: the checkpoint that a run resumes. Another folder of the same step belongs to a
            branch that the run has left, and is renamed too.
    """
    names = []
    for folder in disk.published(root):
        if disk.step_of(folder) >= step and folder.resolve() != origin.resolve():
            left = free_name(root, folder.name.replace("step_", "left_", 1))
            folder.rename(left)
            names.append(left.name)
    return names


def free_name(root: Path, name: str) -> Path:
    """Return `root/name`, with a number appended if that name is taken."""
    path = root / name
    count = 1
    while path.exists():
        path = root / f"{name}.{count}"
        count += 1
    return path


def clear_leftovers(root: Path, lease: Lease | None = None) -> None:
    """Remove what an interrupted save or deletion left; restore a checkpoint it had renamed.

    Raises:
        Superseded: a newer start owns the run folder. The files may belong to its saves.
    """
    if lease is not None:
        lease.check()
    for folder in root.glob(f"{_REPLACED}*"):
        final = folder.with_name(folder.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:  # a crash between the renames of `publish_or_replace`
            with suppress(FileNotFoundError):  # an older start that still runs may have restored it
                folder.rename(final)
    for pattern in (".staging_*", ".deleted_*"):
        for path in root.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    files.clear_partials(root)
