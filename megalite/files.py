"""Files that are complete or absent: atomic writes, hashes, and the rename that publishes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megalite.errors import CommandError

_CHUNK = 4 << 20  # bytes read at a time while hashing
_PARTIAL = ".tmp"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `path` so that a reader, or a crash, sees the old content or the new, never a part.

    The bytes go to a neighbour of another name, are synced, and are renamed over `path`.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def check_target(path: Path, reads: Iterable[Path] = (), *, option: str = "--output") -> None:
    """See to it that `write_atomic` could write `path`, and would replace none of what is read.

    Args:
        path: what a command was given as `option`.
    Raises:
        CommandError: why it could not.
    """
    asked = f"{option} {path}"
    try:
        if not path.parent.is_dir():
            raise CommandError(
                f"{asked}: there is no folder {path.parent}; make it, or name another file"
            )
        if path.exists() and not path.is_file():
            raise CommandError(f"{asked}: it is there and no file; name a file")
        for read in reads:
            if path.exists() and read.exists() and path.samefile(read):
                raise CommandError(f"{asked}: it is {read}, which is read here; name another file")
        if path.is_symlink():  # a device's, too
            raise CommandError(f"{asked} is a link; name the file itself")
        partial = _partial(path)
        partial.touch(exist_ok=False)
        partial.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"{asked}: it cannot be written: {reason}; name another file") from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")


def clear_partials(folder: Path) -> None:
    """Remove what `write_atomic` left in a folder when it was killed."""
    for partial in folder.glob(f".*.????????{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON; numbers that JSON lacks (nan, inf) are an error."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: not JSON, not UTF-8, or nested deeper than Python can follow.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it nests too deep") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_json`.
    """
    return parse_json(read_regular(path))


def read_regular(path: Path) -> bytes:
    """Return the content of a file; OSError if it is none, such as a pipe, which would wait."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file")
    return path.read_bytes()


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object; raises as `read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not a JSON object")
    return value


def each_row(path: Path, *, last: int | None = None) -> Iterator[dict[str, Any] | None]:
    """Yield the objects of a file that holds one a line, one after the other; None for any other
    line.

    Args:
        last: bytes of its end to read; None: all of it.
    """
    with open(path, "rb") as file:
        if last is not None:
            file.seek(max(0, file.seek(0, os.SEEK_END) - last))
        for line in file:
            row = None
            with suppress(ValueError):
                row = parse_json(line)
            yield row if isinstance(row, dict) else None


def read_rows(path: Path, *, last: int | None = None) -> list[dict[str, Any]]:
    """Return the objects of `each_row`, without the lines that a crash cut short."""
    return [row for row in each_row(path, last=last) if row is not None]


def is_plain_name(name: object) -> bool:
    """Return whether a name from a file is that of a file next to it, and cannot lead elsewhere."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and not {"/", "\\"} & set(name)
        and len(name.encode(errors="replace")) <= 255
    )


def is_inner_path(name: object) -> bool:
    """Return whether a path from a file stays below the folder it is relative to; links are not
    seen.
    """
    return isinstance(name, str) and all(is_plain_name(part) for part in name.split("/"))


def sha256_file(path: Path) -> str:
    """Return the file's SHA-256 as 64 hexadecimal digits, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(path: Path) -> None:
    """Force a directory's entries to the disk, so that a rename in it survives a power cut."""
    sync_file(path)


def publish(staging: Path, final: Path) -> None:
    """Rename a complete folder to its public name, the single moment it comes into being."""
    for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
        sync_directory(folder)
    os.rename(staging, final)
    sync_directory(final.parent)


def append_line(path: Path, line: bytes, *, sync: bool = False) -> None:
    """Append one line to a file: whole, or not at all if the disk is full.

    A line that a crash cut short before gets an end of its own first, so that no two lines join.

    Args:
        line: without its end.
        sync: if true, the line is on the disk when this returns.
    Raises:
        OSError: the line was not written, and the file is as it was.
    """
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.fstat(handle).st_size
        cut = end > 0 and os.pread(handle, 1, end - 1) != b"\n"
        data = b"\n" * cut + line + b"\n"
        try:
            written = os.write(handle, data)  # one call: a reader never meets half of a line
            if written < len(data):
                written += os.write(handle, data[written:])  # says why the first one was short
            if sync:
                os.fsync(handle)
        except OSError:
            with suppress(OSError):  # nobody else may have appended since
                if os.fstat(handle).st_size <= end + len(data):
                    os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)


def replace_small(path: Path, content: str) -> None:
    """Replace a small file; on a full disk write over the old content, in the blocks it has.

    Raises:
        OSError: neither was possible; the old content stays.
    """
    try:
        write_atomic(path, content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.is_file():
            raise
        with open(path, "r+b", buffering=0) as file:
            # spaces behind JSON change nothing, and no reader meets the end of the old content
            data = content.encode().ljust(os.fstat(file.fileno()).st_size)
            if file.write(data) < len(data):
                raise
            os.fsync(file.fileno())


@contextmanager
def repeating(
    action: Callable[[], object], *, every: float, ignored: type[Exception] = OSError
) -> Iterator[None]:
    """Call a function regularly, in a thread, until the block ends.

    Args:
        every: seconds between two calls.
        ignored: what a call may raise without an end. A full disk is reported by other writers.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every):
            with suppress(ignored):
                action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
