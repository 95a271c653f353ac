"""Where a command writes: a staging folder beside the output, published by one rename."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megalite.errors import CommandError, MegaLiteError
from megalite.files import publish


def check_output(output: Path) -> None:
    """Refuse a path that no folder can be made at.

    Raises:
        CommandError: not a name, a link, or below what is no folder or cannot be written.
    """
    if output.name in ("", "..") or output.resolve() == Path.cwd():
        raise CommandError(f"--output {str(output)!r} names no new folder; give it a name")
    if output.is_symlink():
        raise CommandError(f"--output {output} is a link; name the folder itself, or a new one")
    for parent in output.parents:
        if parent.exists():
            if not parent.is_dir():
                raise CommandError(f"--output {output} is below {parent}, which is no folder")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise CommandError(
                    f"--output {output}: {parent} cannot be written; name another place"
                )
            return


def refuse_taken(output: Path) -> None:
    """Raises CommandError where something is at `output` but an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CommandError(f"--output {output} exists and is not empty; name a new folder")


@contextmanager
def tidied(output: Path) -> Iterator[None]:
    """Folders above `output` that were made in the block vanish if it fails and they are empty."""
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
    """A folder to write into, which becomes `output` when the block ends, and vanishes if it fails.

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
