"""Reading of compressed files: gzip, bzip2, xz and zstd, with several members or frames.

A truncated file, or one with anything but zeros after its last member, raises an error. The
standard library's bz2 and lzma ignore such data silently, so this module joins their streams.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megalite.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BUFFER = 1 << 20  # bytes
UNPACKED_RATIO = 4  # assumed ratio of unpacked to compressed size
# Exceptions of reading a damaged file.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
_PIECE = 1 << 16  # bytes of a compressed file read at a time


def is_compressed(path: str) -> bool:
    """Return whether a file's name has the ending of a compressed file."""
    return path.lower().endswith(COMPRESSED)


def unreadable(name: str, error: Exception) -> DataError:
    """Return the error for a file that is damaged, truncated, missing or not permitted."""
    system_reason = isinstance(error, OSError) and error.strerror
    reason = " ".join(str(system_reason or error).split()) or type(error).__name__
    return DataError(f"{name}: cannot be read to its end: {reason}")


@contextmanager
def named_damage(name: str, damage: tuple[type[Exception], ...] = READ_ERRORS) -> Iterator[None]:
    """Raise a DataError with the name of a file, table or data set if the block fails to read it.

    Args:
        damage: the exceptions of a failed read.
    """
    try:
        yield
    except damage as error:
        raise unreadable(name, error) from error


class InputFile:
    """A file whose unpacked content `bytes` reads; `size` is its size on disk.

    Raises:
        DataError: the file cannot be opened, or is compressed but empty.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with named_damage(path):
            self._disk = io.FileIO(path)
        self.size = os.fstat(self._disk.fileno()).st_size
        if not self.size and is_compressed(path):
            self._disk.close()
            raise unreadable(path, EOFError("it is empty, which no compressed file is"))
        self.bytes = self._unpack(path.lower())

    def _unpack(self, name: str) -> io.BufferedReader:
        disk = self._disk
        if not is_compressed(name):
            return io.BufferedReader(disk, BUFFER)
        if name.endswith(".gz"):
            return io.BufferedReader(gzip.GzipFile(fileobj=disk, mode="rb"), BUFFER)
        if name.endswith(".zst"):
            import pyarrow as pa

            # pyarrow's reader detects a truncated file; zstandard's does not.
            return io.BufferedReader(pa.CompressedInputStream(disk, "zstd"), BUFFER)
        make = bz2.BZ2Decompressor if name.endswith(".bz2") else lzma.LZMADecompressor
        return io.BufferedReader(_Streams(disk, make), BUFFER)

    def tell_disk(self) -> int:
        """Return the number of bytes read from disk, which may be a buffer ahead."""
        return self._disk.tell()

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self.bytes.close()
        self._disk.close()


class _Streams(io.RawIOBase):
    """Concatenated bzip2 or xz streams, which may have zeros between them."""

    def __init__(
        self,
        disk: io.FileIO,
        make: Callable[[], bz2.BZ2Decompressor] | Callable[[], lzma.LZMADecompressor],
    ) -> None:
        self._disk = disk
        self._make = make
        self._stream = make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        """Return at most `size` bytes, or none at the end of the file."""
        while True:
            packed = b""
            if self._stream.eof:
                packed = (self._stream.unused_data or self._disk.read(_PIECE)).lstrip(b"\0")
                while not packed and (more := self._disk.read(_PIECE)):
                    packed = more.lstrip(b"\0")
                if not packed:
                    return b""
                self._stream = self._make()
            elif self._stream.needs_input and not (packed := self._disk.read(_PIECE)):
                raise EOFError("it ends before its last stream does")
            if data := self._stream.decompress(packed, size):
                return data
