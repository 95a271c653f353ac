"""Output folders of commands: written to a staging folder and published by one rename."""

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
    """Check that a new folder can be made at a path.

    Raises:
        CommandError: the path has no name, is a link, or is below a file or an unwritable folder.
    """
    if output.name in ("", "..") or output.resolve() == Path.cwd():
        raise CommandError(f"{option} {str(output)!r} is not a new folder; give it a name")
    if output.is_symlink():
        raise CommandError(f"{option} {output} is a link; name the folder itself, or a new one")
    parent = _first_parent(output)
    if not parent.is_dir():
        raise CommandError(f"{option} {output} is below {parent}, a file; name another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CommandError(f"{option} {output}: {parent} cannot be written; name another place")


def check_outputs(output: Path, fraction: float | None, held_out: Path | None) -> None:
    """Check a second output and the fraction of documents for it.

    Args:
        fraction: fraction of the documents to hold out.
        held_out: the output of these documents.
    Raises:
        CommandError: one is missing, the fraction is not in (0, 1), or the folders contain each
            other or are on different file systems.
    """
    if held_out is None and fraction is None:
        return
    if held_out is None:
        raise CommandError(f"--valid-fraction {fraction} needs --valid-output DIR, a new folder")
    if fraction is None:
        raise CommandError(f"--valid-output {held_out} needs --valid-fraction F, such as 0.01")
    if not 0 < fraction < 1:
        raise CommandError(
            f"--valid-fraction {fraction} is not between 0 and 1; set it to a fraction such as 0.01"
        )
    check_output(held_out, "--valid-output")
    one = output.resolve()
    other = held_out.resolve()
    work = one.with_name(f".{one.name}.work")
    if one.is_relative_to(other) or other.is_relative_to(one) or other.is_relative_to(work):
        raise CommandError(
            f"--valid-output {held_out} and --output {output} are the same folder, or one is "
            "inside the other; name two separate folders"
        )
    if _file_system(output) != _file_system(held_out):
        raise CommandError(
            f"--valid-output {held_out} is on another file system than --output {output}; name two "
            "folders on one file system, so that both appear at once"
        )


def _file_system(output: Path) -> int:
    return _first_parent(output).stat().st_dev


def _first_parent(output: Path) -> Path:
    """Return the nearest existing folder above an output."""
    return next(parent for parent in output.absolute().parents if parent.exists())


def refuse_taken(output: Path, option: str = "--output") -> None:
    """Raise CommandError if `output` exists and is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CommandError(
            f"{option} {output} exists and is not an empty folder; name a new folder"
        )


@contextmanager
def remove_created_parents(output: Path) -> Iterator[None]:
    """Remove the empty folders above `output` that the block created if it fails."""
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
    """Yield a staging folder, which is renamed to `output` at the end, or removed on failure.

    Raises:
        CommandError: `output` exists and is not an empty folder.
        MegaLiteError: the output cannot be written.
    """
    check_output(output)
    refuse_taken(output)
    staging = output.with_name(f".{output.name}.{secrets.token_hex(4)}.staging")
    with remove_created_parents(output):
        try:
            staging.mkdir(parents=True)
            yield staging
            publish(staging, output)
        except OSError as error:
            raise MegaLiteError(f"{output} was not written: {error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
