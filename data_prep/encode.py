"""`tokenize`: documents into shards, and a manifest that says what they are.

The shards are a function of the input, the tokenizer and the options that the manifest records:
the number of workers changes the time alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.inputs import Unit, find_units
from data_prep.output import ShardSeries, staged
from data_prep.readers import BadRecords, read_documents
from megalite.errors import CommandError, DataError
from megalite.files import sync_directory, sync_file
from megalite.formats.index import Integers, dtype_for
from megalite.formats.manifest import Manifest, SourceInfo, TokenizerInfo, write_manifest
from megalite.formats.tokenizer import Tokenizer, check_round_trip, load_tokenizer
from megalite.log import logger

# Encoded at once. Documents are dealt to threads, so a batch holds many times as many as there are.
_BATCH_CHARACTERS = 8 << 20
_REPORT_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class TokenizeOptions:
    """The arguments of `tokenize`."""

    inputs: Sequence[str]
    tokenizer: str
    output: Path
    text_field: str = "text"
    shard_tokens: int = 100_000_000
    workers: int = 1
    max_bad_records: int = 0
    bos: bool = False
    eos: bool = True

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: all that the shards depend on, and nothing else."""
        kept = asdict(self)
        del kept["output"], kept["workers"]
        return {**kept, "inputs": list(self.inputs)}


@dataclass
class _Tally:
    """What one --input gave so far."""

    files: int = 0
    bytes: int = 0
    documents: int = 0
    tokens: int = 0
    bad_records: int = 0


class _Encoder:
    """A tokenizer with its policy for the ends of documents."""

    def __init__(self, tokenizer: Tokenizer, *, bos: bool, eos: bool) -> None:
        self._tokenizer = tokenizer
        self.bos = _control(tokenizer.bos_id, "BOS", "leave out --bos") if bos else None
        self.eos = _control(tokenizer.eos_id, "EOS", "pass --no-eos") if eos else None
        self._before = np.array([] if self.bos is None else [self.bos], np.int32)
        self._after = np.array([] if self.eos is None else [self.eos], np.int32)

    def encode(self, texts: Sequence[str], *, threads: int) -> Iterator[Integers]:
        for ids in self._tokenizer.encode_batch(texts, threads=threads):
            yield np.concatenate([self._before, ids, self._after])


def tokenize(options: TokenizeOptions) -> Manifest:
    """Encode all documents of the input into a new shard folder.

    Raises:
        CommandError: an input that names nothing, an output that is taken.
        DataError: a tokenizer or a file that cannot be used, too many bad records, no document.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    check_round_trip(tokenizer)
    encoder = _Encoder(tokenizer, bos=options.bos, eos=options.eos)
    units = find_units(options.inputs)
    tallies = [_Tally() for _ in options.inputs]
    dtype = dtype_for(tokenizer.vocab_size)
    with staged(options.output) as staging:
        with ShardSeries(
            staging, dtype, vocab_size=tokenizer.vocab_size, shard_tokens=options.shard_tokens
        ) as series:
            for batch in _with_progress(_batches(units, options, tallies), tallies):
                texts = [text for _, text in batch]
                encoded = encoder.encode(texts, threads=options.workers)
                for (source, _), ids in zip(batch, encoded, strict=True):
                    series.add_document(ids)
                    tallies[source].tokens += ids.size
        manifest = Manifest(
            dtype=dtype.name,
            vocab_size=tokenizer.vocab_size,
            tokenizer=_save(tokenizer, staging),
            bos=encoder.bos,
            eos=encoder.eos,
            documents=sum(tally.documents for tally in tallies),
            tokens=sum(tally.tokens for tally in tallies),
            shards=series.shards,
            sources=[
                SourceInfo(input=name, **asdict(tally))
                for name, tally in zip(options.inputs, tallies, strict=True)
            ],
            arguments=options.recorded(),
        )
        if not manifest.documents:
            raise DataError(f"no document in {', '.join(options.inputs)}; nothing was written")
        write_manifest(staging, manifest)
    return manifest


def _batches(
    units: Sequence[Unit], options: TokenizeOptions, tallies: Sequence[_Tally]
) -> Iterator[list[tuple[int, str]]]:
    """Documents in order, each with the number of its --input, some millions of characters a time.

    The tallies count what was read; only one batch is held.
    """
    bad = BadRecords(options.max_bad_records)
    batch, characters = [], 0
    for unit in units:
        tally, bad_before = tallies[unit.source], bad.count
        for text in read_documents(unit, options.text_field, bad):
            batch.append((unit.source, text))
            tally.documents += 1
            tally.bytes += len(text.encode())
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        tally.files += 1
        tally.bad_records += bad.count - bad_before
    if batch:
        yield batch


def _with_progress(
    batches: Iterator[list[tuple[int, str]]], tallies: Sequence[_Tally]
) -> Iterator[list[tuple[int, str]]]:
    """The same batches; every few seconds, and at the end, a line with the rate."""
    began = reported = time.monotonic()
    for batch in batches:
        yield batch
        if time.monotonic() - reported >= _REPORT_EVERY:
            reported = time.monotonic()
            _report("so far", tallies, reported - began)
    _report("all", tallies, time.monotonic() - began)


def _report(label: str, tallies: Sequence[_Tally], seconds: float) -> None:
    documents = sum(tally.documents for tally in tallies)
    size, tokens = sum(tally.bytes for tally in tallies), sum(tally.tokens for tally in tallies)
    logger.info(
        "%s: %s documents, %.1f MB of text, %s tokens in %.1f s (%.2f MB/s, %s tokens/s)",
        *(label, f"{documents:,}", size / 1e6, f"{tokens:,}", seconds),
        *(size / 1e6 / max(seconds, 1e-9), f"{tokens / max(seconds, 1e-9):,.0f}"),
    )


def _save(tokenizer: Tokenizer, staging: Path) -> TokenizerInfo:
    folder = staging / "tokenizer"
    folder.mkdir()
    name = tokenizer.save(folder)
    for file in folder.iterdir():
        sync_file(file)
    sync_directory(folder)
    return TokenizerInfo(path=f"{folder.name}/{name}", sha256=tokenizer.sha256)


def _control(id: int | None, name: str, otherwise: str) -> int:
    if id is None:
        raise CommandError(f"the tokenizer has no {name} token; use another, or {otherwise}")
    return id
