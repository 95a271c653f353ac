"""A worker, which claims parts of the input and encodes each into a file.

The content of a part's file does not depend on the worker.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from data_prep.encoder import Encoder
from data_prep.part_files import Counts, PartHeader, inspect_part, part_name, sha256_of
from data_prep.part_reader import PartReader
from data_prep.records import BadRecord, BadRecordCounter
from data_prep.scheduler import PartScheduler
from data_prep.streams import Stream
from data_prep.work_folder import PrepRun

_BATCH_CHARACTERS = 1 << 20  # encoded at once
_NAMED_FAULTS = 20  # bad records that a part's header names
_PATIENCE = 30.0  # seconds, at least, before a worker does another worker's part
_POLL = 0.01
_LONGEST_POLL = 0.5  # seconds


class Worker:
    """Worker that encodes parts until all are done.

    Args:
        place: number of this worker. The leader of other workers has the number `places`.
        places: number of workers.
    """

    def __init__(
        self, run: PrepRun, streams: Sequence[Stream], encoder: Encoder, *, place: int, places: int
    ) -> None:
        self._run = run
        self._streams = streams
        self._encoder = encoder
        self.keys = [encoder.key(stream) for stream in streams]
        self._name = f"{place:05d}"
        self._scheduler = PartScheduler(run, streams, self.keys, place / places)
        # The limit is for all workers together, but one worker may already exceed it.
        self._bad = BadRecordCounter(encoder.options.max_bad_records)
        self._reader = PartReader(encoder.options.text_field)
        self._tally = Counts()
        self._covered = 0
        self._longest = 0.0
        self._began = self._ended = 0.0

    def encode_all(self) -> None:
        """Encode parts until all are claimed."""
        try:
            while (part := self._scheduler.take()) is not None:
                self._do(*part)
        finally:
            self._reader.close()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready`. Meanwhile, do the parts of workers that seem to have died.

        Raises:
            FileNotFoundError: the run is over.
        """
        wait(self._run, ready, self._do_missing, longest=self._longest)

    def _do_missing(self) -> None:
        for number, part in missing(self._run, self._streams, self.keys):
            self._do(number, part)
        self._reader.close()

    def all_done(self) -> bool:
        """Return whether all parts of all streams are done."""
        return not missing(self._run, self._streams, self.keys)

    def _do(self, number: int, part: int) -> None:
        self._run.check()
        start = time.time()
        name = part_name(self.keys[number], part)
        stream = self._streams[number]
        path = self._run.part(name)
        header = inspect_part(path) if path.exists() else None
        if header is None:
            header = self._encode(stream, part, path)
            self._tally.add(header.tally)
            self._began = self._began or start
            self._ended = time.time()
        if stream.parts is None and header.ended:
            self._run.end(self.keys[number], part)
        self._run.finish(name)
        self._longest = max(self._longest, time.time() - start)
        self._covered += header.tally.consumed
        times = {"began": self._began, "ended": self._ended, "covered": self._covered}
        self._run.report(self._name, asdict(self._tally) | times)

    def _encode(self, stream: Stream, part: int, path: Path) -> PartHeader:
        tally = Counts()
        faults = list[str]()
        hashes = self._encoder.options.hashes
        encoded = [(np.empty(0, self._encoder.dtype), np.empty(0, np.int64))]
        digests = list[bytes]()
        sizes = list[int]()
        for texts in self._batches(stream, part, tally, faults):
            for data in (text.encode() for text in texts if hashes):
                digests.append(hashlib.blake2b(data, digest_size=16).digest())
                sizes.append(len(data))
            encoded.append(self._encoder.encode(texts))
        tokens, lengths = map(np.concatenate, zip(*encoded, strict=True))
        arrays: dict[str, npt.NDArray[Any]] = {"tokens": tokens, "lengths": lengths}
        if hashes:
            arrays["hashes"] = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
            arrays["bytes"] = np.array(sizes, np.int64)
        tally.tokens = tokens.size
        tally.documents = lengths.size
        tally.consumed = self._reader.consumed
        header = PartHeader(tally, self._reader.ended, sha256_of(arrays), faults)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            save_file(arrays, partial, {"part": json.dumps(asdict(header))})
            os.replace(partial, path)
        except SafetensorError as error:  # raised instead of OSError, such as for a full disk
            raise OSError(f"{partial}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return header

    def _batches(
        self, stream: Stream, part: int, tally: Counts, faults: list[str]
    ) -> Iterator[list[str]]:
        """Yield batches of a part's documents, with about a million characters each."""
        batch = list[str]()
        characters = 0
        for record in self._reader.read(stream, part):
            if isinstance(record, BadRecord):
                self._bad.add(record)
                tally.bad_records += 1
                if len(faults) < _NAMED_FAULTS:
                    faults.append(f"{record.place}: {record.reason}")
                continue
            batch.append(record)
            size = len(record)
            characters += size
            # ASCII text has one byte a character; other text is encoded to count its bytes.
            tally.bytes += size if record.isascii() else len(record.encode())
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch = []
                characters = 0
        if batch:
            yield batch


def wait(
    run: PrepRun, ready: Callable[[], bool], do_left: Callable[[], None], *, longest: float = 0.0
) -> None:
    """Wait until `ready`. If no part gets done for long, call `do_left` to do what is left.

    Args:
        longest: the longest time in seconds that a part has taken.
    """
    since = time.monotonic()
    pause = _POLL
    before = -1
    while not ready():
        run.check()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL)
        now = time.monotonic()
        if (done := len(run.done())) != before:  # other workers make progress
            longest = max(longest, now - since) if before >= 0 else longest
            since = now
            before = done
        if now - since > max(_PATIENCE, 5 * longest):
            do_left()
            longest = max(longest, time.monotonic() - now)
            since = time.monotonic()


def missing(run: PrepRun, streams: Sequence[Stream], keys: Sequence[str]) -> list[tuple[int, int]]:
    """Return the parts that are not done, but only the first one of a stream of unknown length."""
    done = run.done()
    left = list[tuple[int, int]]()
    for number, (stream, key) in enumerate(zip(streams, keys, strict=True)):
        last = run.last(key) if stream.parts is None else stream.parts - 1
        if last is None:
            left.append((number, next(p for p in count() if part_name(key, p) not in done)))
        else:
            left += [(number, p) for p in range(last + 1) if part_name(key, p) not in done]
    return left
