"""One worker: takes parts of the input nobody has taken, and encodes each into a file.

Which worker takes what is left to chance; a part's file depends on the part alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data_prep.part_reader import PartReader
from data_prep.records import BadRecords, Fault
from data_prep.streams import Stream
from data_prep.work_folder import Run
from megalite.errors import CommandError, DataError
from megalite.files import parse_json
from megalite.formats.index import Dtype, Integers, dtype_for
from megalite.tokenizers.tokenizer import Tokenizer

_VERSION = 1  # of a part's content
_BATCH_CHARACTERS = 1 << 20  # encoded at once
_KEPT_FAULTS = 20  # a part, with their places
_IMPATIENT = 30.0  # seconds after which another worker's part is done again, at least
_POLL, _LONGEST_POLL = 0.01, 0.5  # seconds


@dataclass(frozen=True)
class TokenizeOptions:
    """The arguments of `tokenize`.

    workers: of each rank. bos: None means that documents begin as the tokenizer begins its texts.
    """

    inputs: Sequence[str]
    tokenizer: str
    output: Path
    text_field: str = "text"
    shard_tokens: int = 100_000_000
    workers: int = 1
    max_bad_records: int = 0
    bos: bool | None = None
    eos: bool = True
    deduplicate: bool = False
    streaming: bool = True
    lossy: bool = False
    valid_fraction: float | None = None  # of the documents, written to `valid_output`
    valid_output: Path | None = None

    @property
    def hashes(self) -> bool:
        """Whether parts keep a hash of each document."""
        return self.deduplicate or self.valid_fraction is not None

    def recorded(self) -> dict[str, Any]:
        """Return the options that decide the shards, for the manifest."""
        kept = asdict(self)
        del kept["output"], kept["workers"], kept["valid_output"]
        if self.valid_fraction is None:
            del kept["valid_fraction"]
        return {**kept, "inputs": list(self.inputs)}

    def asked(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the options that two runs must share to share their work."""
        begins = bool(tokenizer.prefix_ids) if self.bos is None else self.bos
        asked = self.recorded() | {"tokenizer": tokenizer.sha256, "bos": begins}
        if self.valid_output is not None:
            asked["valid_output"] = str(self.valid_output)
        del asked["max_bad_records"]
        return asked


@dataclass
class Counts:
    """Counts of documents and tokens; `bytes` are of UTF-8 text, `consumed` of files on disk."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    bad_records: int = 0
    consumed: int = 0

    def add(self, other: Counts) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Part:
    """Header of the file of an encoded part."""

    tally: Counts
    ended: bool  # no part of the stream follows
    sha256: str  # of the file's arrays
    faults: list[str] = field(default_factory=list)


class Encoder:
    """A tokenizer with what was asked of it: whether documents have BOS and EOS, and the rest.

    The tokenizer records what documents begin with.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenizeOptions) -> None:
        self.tokenizer, before = tokenizer, list(tokenizer.prefix_ids)
        begins = bool(before) if options.bos is None else options.bos
        if begins and not before:
            before = [_control(tokenizer.bos_id, "BOS", "leave out --bos")]
        if begins != bool(tokenizer.prefix_ids):
            tokenizer.begin_with_bos(begins)
        self.options = replace(options, bos=begins)
        self._before = before if begins else []
        self.bos = self._before[0] if begins else None
        self.eos = _control(tokenizer.eos_id, "EOS", "pass --no-eos") if options.eos else None
        self.dtype: Dtype = dtype_for(tokenizer.vocab_size)

    def encode(self, texts: Sequence[str]) -> tuple[Integers, npt.NDArray[np.int64]]:
        """Return the ids of all texts as one array, in the shards' dtype, and each text's length.

        Raises:
            DataError: an id outside the vocabulary, which no dtype would hold unharmed.
        """
        rows = self.tokenizer.encode_batch(texts)
        around = len(self._before) + (self.eos is not None)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows)) + around
        ids = np.concatenate(rows) if rows else np.empty(0, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
            raise DataError(
                f"the tokenizer gives ids from {ids.min()} to {ids.max()}, outside its own "
                f"vocabulary of {self.tokenizer.vocab_size}; its file is damaged"
            )
        if not around:
            return ids.astype(self.dtype), lengths
        tokens = np.empty(ids.size + around * len(rows), self.dtype)
        ends, inner = np.cumsum(lengths), np.ones(tokens.size, np.bool_)
        starts = [(id, ends - lengths + n) for n, id in enumerate(self._before)]
        for id, places in (*starts, (self.eos, ends - 1)):
            if id is not None:
                tokens[places], inner[places] = id, False
        tokens[inner] = ids
        return tokens, lengths

    def key(self, stream: Stream) -> str:
        """Return the name of a stream's parts: a hash of everything that decides their content."""
        text_field, hashes = self.options.text_field, self.options.hashes
        begins = self._before if len(self._before) > 1 else self.bos
        made_by = [self.tokenizer.sha256, begins, self.eos, text_field, hashes]
        wish = [_VERSION, stream.identity, *made_by]
        return hashlib.sha256(json.dumps(wish).encode()).hexdigest()[:20]


def part_name(key: str, part: int) -> str:
    return f"{key}_{part:06d}"


class PartScheduler:
    """Choice of the part that a worker takes next.

    Workers begin at different places of the input, so that they meet late. The worker that began
    a compressed file continues it; others share it only when nothing else is left.

    Args:
        start: where to begin, a share of the input in [0, 1).
    """

    def __init__(self, run: Run, streams: Sequence[Stream], keys: Sequence[str], start: float):
        self._run, self._streams, self._keys = run, streams, keys
        places = [
            (number, part)
            for number, stream in enumerate(streams)
            for part in (range(stream.parts) if stream.parts is not None else (None,))
        ]
        first = int(start * len(places))
        self._places = iter(places[first:] + places[:first])
        self._open = [number for number, stream in enumerate(streams) if stream.parts is None]
        self._tried = dict.fromkeys(self._open, -1)
        self._reading: int | None = None

    def take(self) -> tuple[int, int] | None:
        """Return a stream's number and a part that is now this worker's; None if none is left."""
        if self._reading is not None and (found := self._next_of(self._reading)):
            return found
        for number, part in self._places:
            if self._claim(number, part or 0):
                self._reading = None if part is not None else number
                return number, part or 0
        for number in self._open:
            if found := self._next_of(number):
                self._reading = number
                return found
        return None

    def _next_of(self, number: int) -> tuple[int, int] | None:
        while True:
            part = self._tried[number] + 1
            if (last := self._run.last(self._keys[number])) is not None and part > last:
                return None
            self._tried[number] = part
            if self._claim(number, part):
                return number, part

    def _claim(self, number: int, part: int) -> bool:
        if number in self._tried:
            self._tried[number] = max(self._tried[number], part)
        return self._run.claim(part_name(self._keys[number], part))


class Worker:
    """Worker that encodes parts until all are done.

    Args:
        place: of this worker among `places`; the leader of other workers stands behind them.
    """

    def __init__(
        self, run: Run, streams: Sequence[Stream], encoder: Encoder, *, place: int, places: int
    ) -> None:
        self._run, self._streams, self._encoder = run, streams, encoder
        self.keys = [encoder.key(stream) for stream in streams]
        self._name = f"{place:05d}"
        self._scheduler = PartScheduler(run, streams, self.keys, place / places)
        # of all workers together; one that alone finds more bad records stops all
        self._bad = BadRecords(encoder.options.max_bad_records)
        self._reader = PartReader(encoder.options.text_field)
        self._tally, self._covered, self._longest = Counts(), 0, 0.0
        self._began = self._ended = 0.0

    def encode_all(self) -> None:
        """Do parts until there is nothing to take, then what others took and do not finish."""
        try:
            while (found := self._scheduler.take()) is not None:
                self._do(*found)
        finally:
            self._reader.close()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready`. Meanwhile, do the parts that their workers seem to have left.

        Raises:
            FileNotFoundError: the run is over.
        """
        wait(self._run, ready, self._do_missing, longest=self._longest)

    def _do_missing(self) -> None:
        for number, part in missing(self._run, self._streams, self.keys):
            self._do(number, part)
        self._reader.close()

    def all_done(self) -> bool:
        """Whether every part of every stream is done, by whomever."""
        return not missing(self._run, self._streams, self.keys)

    def _do(self, number: int, part: int) -> None:
        self._run.check()
        start = time.time()
        name, stream = part_name(self.keys[number], part), self._streams[number]
        path = self._run.part(name)
        made = inspect_part(path) if path.exists() else None
        if made is None:
            made = self._encode(stream, part, path)
            self._tally.add(made.tally)
            self._began, self._ended = self._began or start, time.time()
        if stream.parts is None and made.ended:
            self._run.end(self.keys[number], part)
        self._run.finish(name)
        self._longest = max(self._longest, time.time() - start)
        self._covered += made.tally.consumed
        times = {"began": self._began, "ended": self._ended, "covered": self._covered}
        self._run.report(self._name, asdict(self._tally) | times)

    def _encode(self, stream: Stream, part: int, path: Path) -> Part:
        tally, faults, hashes = Counts(), list[str](), self._encoder.options.hashes
        encoded = [(np.empty(0, self._encoder.dtype), np.empty(0, np.int64))]
        digests, sizes = list[bytes](), list[int]()
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
        tally.tokens, tally.documents = tokens.size, lengths.size
        tally.consumed = self._reader.consumed
        made = Part(tally, self._reader.ended, _sha256(arrays), faults)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            save_file(arrays, partial, {"part": json.dumps(asdict(made))})
            os.replace(partial, path)
        except SafetensorError as error:  # its kind of OSError, for a full disk
            raise OSError(f"{partial}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return made

    def _batches(
        self, stream: Stream, part: int, tally: Counts, faults: list[str]
    ) -> Iterator[list[str]]:
        """Yield the documents of a part, about a million characters at a time."""
        batch, characters = list[str](), 0
        for record in self._reader.read(stream, part):
            if isinstance(record, Fault):
                self._bad.add(record)
                tally.bad_records += 1
                if len(faults) < _KEPT_FAULTS:
                    faults.append(f"{record.place}: {record.reason}")
                continue
            batch.append(record)
            size = len(record)
            characters += size
            # a character is one byte in most text; else the text is encoded to count them
            tally.bytes += size if record.isascii() else len(record.encode())
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch


def read_header(path: Path) -> Part:
    """Return the header of a part's file."""
    with safe_open(path, framework="np") as file:
        found = parse_json(file.metadata()["part"])
    return Part(**{**found, "tally": Counts(**found["tally"])})


def inspect_part(path: Path) -> Part | None:
    """Return the header of a part's file. If its hash is wrong, remove the file and return None."""
    try:
        made = read_header(path)
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _sha256(arrays) == made.sha256:
            return made
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        pass
    path.unlink(missing_ok=True)
    return None


def wait(
    run: Run, ready: Callable[[], bool], do_left: Callable[[], None], *, longest: float = 0.0
) -> None:
    """Wait until `ready`. If nothing more gets done, do what other workers seem to have left.

    Args:
        longest: seconds that a piece of work is known to take.
    """
    since, pause, before = time.monotonic(), _POLL, -1
    while not ready():
        run.check()
        time.sleep(pause)
        pause, now = min(2 * pause, _LONGEST_POLL), time.monotonic()
        if (done := len(run.done())) != before:  # somebody works
            longest = max(longest, now - since) if before >= 0 else longest
            since, before = now, done
        if now - since > max(_IMPATIENT, 5 * longest):
            do_left()
            longest, since = max(longest, time.monotonic() - now), time.monotonic()


def missing(run: Run, streams: Sequence[Stream], keys: Sequence[str]) -> list[tuple[int, int]]:
    """Return the parts that are not done; of a stream of unknown end, the first such part."""
    done, left = run.done(), list[tuple[int, int]]()
    for number, (stream, key) in enumerate(zip(streams, keys, strict=True)):
        last = run.last(key) if stream.parts is None else stream.parts - 1
        if last is None:
            left.append((number, next(p for p in count() if part_name(key, p) not in done)))
        else:
            left += [(number, p) for p in range(last + 1) if part_name(key, p) not in done]
    return left


def _sha256(arrays: dict[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _control(id: int | None, name: str, otherwise: str) -> int:
    if id is None:
        raise CommandError(f"the tokenizer has no {name} token; use another, or {otherwise}")
    return id
