"""Output of a command: a staging folder next to the final one, published by one rename."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megalite.errors import CommandError, MegaLiteError
from megalite.files import publish


def check_output(output: Path, option: str = "--output") -> None:
    """Refuse a path that no folder can be made at.

    Raises:
        CommandError: not a name, a link, or below what is no folder or cannot be written.
    """
    if output.name in ("", "..") or output.resolve() == Path.cwd():
        raise CommandError(f"{option} {str(output)!r} names no new folder; give it a name")
    if output.is_symlink():
        raise CommandError(f"{option} {output} is a link; name the folder itself, or a new one")
    parent = _first_parent(output)
    if not parent.is_dir():
        raise CommandError(f"{option} {output} is below {parent}, which is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CommandError(f"{option} {output}: {parent} cannot be written; name another place")


def check_outputs(output: Path, fraction: float | None, held_out: Path | None) -> None:
    """Refuse two outputs that cannot both be written, and a fraction that is none.

    Args:
        fraction: the share of documents that goes to `held_out`.

    Raises:
        CommandError: one without the other, a fraction outside (0, 1), folders within each other
            or on two file systems.
    """
    if held_out is None and fraction is None:
        return
    if held_out is None:
        raise CommandError(f"--valid-fraction {fraction} needs --valid-output DIR, a new folder")
    if fraction is None:
        raise CommandError(f"--valid-output {held_out} needs --valid-fraction F, such as 0.01")
    if not 0 < fraction < 1:
        raise CommandError(
            f"--valid-fraction {fraction} is no share between 0 and 1; give one such as 0.01"
        )
    check_output(held_out, "--valid-output")
    one = output.resolve()
    other = held_out.resolve()
    work = one.with_name(f".{one.name}.work")
    if one.is_relative_to(other) or other.is_relative_to(one) or other.is_relative_to(work):
        raise CommandError(
            f"--valid-output {held_out} and --output {output} are one folder, or one within the "
            "other; name two folders next to each other"
        )
    if _file_system(output) != _file_system(held_out):
        raise CommandError(
            f"--valid-output {held_out} is on another file system than --output {output}, so that "
            "both could not appear at once; name two folders of one file system"
        )


def _file_system(output: Path) -> int:
    return _first_parent(output).stat().st_dev


def _first_parent(output: Path) -> Path:
    """Return the nearest folder above an output that exists."""
    return next(parent for parent in output.absolute().parents if parent.exists())


def refuse_taken(output: Path, option: str = "--output") -> None:
    """Raise CommandError if `output` exists and is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CommandError(f"{option} {output} exists and is not empty; name a new folder")


@contextmanager
def tidied(output: Path) -> Iterator[None]:
    """Remove the folders above `output` that the block created, if it fails and they are empty."""
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Give a folder to write into. It becomes `output` when the block ends, and is removed if it
    fails.

    Raises:
        CommandError: `output` exists and is not an empty folder.
        MegaLiteError: the disk refused.
    """
    check_output(output)
    refuse_taken(output)
    staging = output.with_name(f".{output.name}.{secrets.token_hex(4)}.staging")
    with tidied(output):
        try:
            staging.mkdir(parents=True)
            yield staging
            publish(staging, output)
        except OSError as error:
            raise MegaLiteError(f"{output} was not written: {error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
