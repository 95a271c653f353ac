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

    The bytes are written to a temporary file in the same folder, synced, and renamed to `path`.
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
    """Check that `write_atomic` can write `path`, and does not replace an input of the command.

    Args:
        path: the output of a command.
        reads: the inputs of the command.
        option: the option that `path` is the value of.
    Raises:
        CommandError: the path cannot be written, or is an input.
    """
    argument = f"{option} {path}"
    try:
        if not path.parent.is_dir():
            raise CommandError(
                f"{argument}: there is no folder {path.parent}; create it, or name another file"
            )
        if path.exists() and not path.is_file():
            raise CommandError(f"{argument}: it exists and is not a file; name another file")
        for read in reads:
            if path.exists() and read.exists() and path.samefile(read):
                raise CommandError(f"{argument}: it is the input {read}; name another file")
        if path.is_symlink():  # or a link to a device
            raise CommandError(f"{argument} is a link; name the file itself")
        partial = _partial(path)
        partial.touch(exist_ok=False)
        partial.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(
            f"{argument}: it cannot be written: {reason}; name another file"
        ) from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")


def clear_partials(folder: Path) -> None:
    """Remove temporary files of `write_atomic` calls that were killed."""
    for partial in folder.glob(f".*.????????{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with `write_atomic`; nan and inf raise a ValueError."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: the text is not JSON, not UTF-8, or nested too deep for Python.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `parse_json`.
    """
    return parse_json(read_regular(path))


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: the file cannot be read, or is not regular: reading a pipe could wait forever.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file")
    return path.read_bytes()


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        OSError, ValueError: as `read_json`.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"it contains {type(value).__name__}, not a JSON object")
    return value


def each_row(path: Path, *, last: int | None = None) -> Iterator[dict[str, Any] | None]:
    """Yield the JSON object of each line of a file; None for a line without one.

    Args:
        path: the file, such as `metrics.jsonl`.
        last: bytes to read, at the end of the file. None means the whole file.
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
    """Return the objects of `each_row`, without lines that a crash truncated."""
    return [row for row in each_row(path, last=last) if row is not None]


def is_plain_name(name: object) -> bool:
    """Return whether a name can only be that of a file in the same folder."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and not {"/", "\\"} & set(name)
        and len(name.encode(errors="replace")) <= 255
    )


def is_inner_path(name: object) -> bool:
    """Return whether a relative path stays within its folder. Links are not resolved."""
    return isinstance(name, str) and all(is_plain_name(part) for part in name.split("/"))


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename in it survives a power failure."""
    sync_file(path)


def publish(staging: Path, final: Path) -> None:
    """Flush a complete folder to the disk and rename it to its final name, in one atomic step."""
    for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
        sync_directory(folder)
    os.rename(staging, final)
    sync_directory(final.parent)


def append_line(path: Path, line: bytes, *, sync: bool = False) -> None:
    """Append one line to a file, completely or not at all.

    If a crash truncated the last line, a line end is written first, so that the lines do not join.

    Args:
        path: the file.
        line: the line without its end.
        sync: whether to flush the line to the disk before returning.
    Raises:
        OSError: the line was not written, and the file is unchanged.
    """
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.fstat(handle).st_size
        truncated = end > 0 and os.pread(handle, 1, end - 1) != b"\n"
        data = b"\n" * truncated + line + b"\n"
        try:
            written = os.write(handle, data)  # one call, so that no reader sees half a line
            if written < len(data):
                written += os.write(handle, data[written:])  # raises the reason if it fails again
            if sync:
                os.fsync(handle)
        except OSError:
            with suppress(OSError):  # only if no other process has appended since
                if os.fstat(handle).st_size <= end + len(data):
                    os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)


def replace_small(path: Path, content: str) -> None:
    """Replace a small file; if the disk is full, overwrite its existing blocks.

    Raises:
        OSError: both ways failed, and the old content stays.
    """
    try:
        write_atomic(path, content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.is_file():
            raise
        with open(path, "r+b", buffering=0) as file:
            # spaces cover the end of a longer old content; after JSON they have no meaning
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
        action: the function.
        every: seconds between two calls.
        ignored: exceptions of a call after which the calls continue. OSError is the default,
            because other writers report a full disk.
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
