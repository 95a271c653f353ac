"""Where a command writes: a staging folder beside the output, published by one rename."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from megalite.errors import CommandError, MegaLiteError
from megalite.files import publish
from megalite.formats.index import Dtype, Integers
from megalite.formats.shards import ShardInfo, ShardWriter


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when the block ends, and vanishes if it fails.

    Raises:
        CommandError: `output` exists and is not an empty folder.
        MegaLiteError: the disk refused.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CommandError(f"--output {output} exists and is not empty; name a new folder")
    created = [parent for parent in output.parents if not parent.exists()]
    staging = output.with_name(f".{output.name}.{secrets.token_hex(4)}.staging")
    try:
        staging.mkdir(parents=True)
        yield staging
        publish(staging, output)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            for parent in created:
                parent.rmdir()
        if isinstance(error, OSError):
            raise MegaLiteError(f"{output} was not written: {error}") from error
        raise


class ShardSeries:
    """Documents, one after the other, into shards of at most `shard_tokens` tokens.

    A document is never cut, so one that is longer than that has a shard to itself. Where shards
    end depends on the documents alone.
    """

    def __init__(self, folder: Path, dtype: Dtype, *, vocab_size: int, shard_tokens: int) -> None:
        self.shards: list[ShardInfo] = []
        self._folder, self._dtype = folder, dtype
        self._vocab_size, self._shard_tokens = vocab_size, shard_tokens
        self._writer: ShardWriter | None = None

    def add_document(self, ids: Integers) -> None:
        """Append a document; DataError where an id is outside the vocabulary."""
        if self._writer and self._writer.tokens + ids.size > self._shard_tokens:
            self.close()
        if self._writer is None:
            name = f"shard_{len(self.shards):05d}"
            self._writer = ShardWriter(self._folder, name, self._dtype, vocab_size=self._vocab_size)
        self._writer.add_document(ids)

    def close(self) -> None:
        """Complete the last shard."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self.shards.append(writer.close())

    def __enter__(self) -> ShardSeries:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif self._writer is not None:
            self._writer.__exit__(kind, error, trace)
