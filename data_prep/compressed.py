"""Compressed files as the bytes in them: gzip, bzip2, xz and zstd, of several members or frames.

A file that is cut, or that has anything but zeros after its last member, cannot be read to its end.
The standard library's bz2 and lzma ignore such a rest silently, so their streams are joined here.
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
UNPACKED_RATIO = 4  # a compressed file is taken to hold this many times its size
# what reading a damaged file raises
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
_PIECE = 1 << 16  # bytes of a packed file at once


def is_compressed(path: str) -> bool:
    """Return whether a file's name says that it is compressed."""
    return path.lower().endswith(COMPRESSED)


def unreadable(name: str, error: Exception) -> DataError:
    """Return the error for a file that is damaged, cut, gone or forbidden."""
    known = isinstance(error, OSError) and error.strerror
    reason = " ".join(str(known or error).split()) or type(error).__name__
    return DataError(f"{name}: cannot be read to its end: {reason}")


@contextmanager
def named_damage(name: str, damage: tuple[type[Exception], ...] = READ_ERRORS) -> Iterator[None]:
    """Raise a DataError that names the file, table or data set, if reading it fails."""
    try:
        yield
    except damage as error:
        raise unreadable(name, error) from error


class InputFile:
    """A file's bytes, unpacked: `bytes` reads them, `size` is its size on disk.

    Raises:
        DataError: a file that cannot be opened, or is packed and empty.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with named_damage(path):
            self._disk = io.FileIO(path)
        self.size = os.fstat(self._disk.fileno()).st_size
        if not self.size and is_compressed(path):
            self._disk.close()
            raise unreadable(path, EOFError("it is empty; even nothing takes bytes when packed"))
        self.bytes = self._unpack(path.lower())

    def _unpack(self, name: str) -> io.BufferedReader:
        disk = self._disk
        if not is_compressed(name):
            return io.BufferedReader(disk, BUFFER)
        if name.endswith(".gz"):
            return io.BufferedReader(gzip.GzipFile(fileobj=disk, mode="rb"), BUFFER)
        if name.endswith(".zst"):
            import pyarrow as pa

            # pyarrow's reader detects a cut file; zstandard's takes the cut for the end
            return io.BufferedReader(pa.CompressedInputStream(disk, "zstd"), BUFFER)
        make = bz2.BZ2Decompressor if name.endswith(".bz2") else lzma.LZMADecompressor
        return io.BufferedReader(_Streams(disk, make), BUFFER)

    def tell_disk(self) -> int:
        """Return how many bytes on disk have been read, up to a buffer."""
        return self._disk.tell()

    def close(self) -> None:
        """Close the file; it may be closed twice."""
        self.bytes.close()
        self._disk.close()


class _Streams(io.RawIOBase):
    """bzip2 or xz streams, one after another, with zeros between them or none."""

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
        """Return some bytes, at most `size`; none at the end of the file."""
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
