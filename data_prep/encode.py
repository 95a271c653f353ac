"""`tokenize`: documents into shards, and a manifest that says what they are.

The shards are a function of the input, the tokenizer and the options that the manifest records:
the number of workers changes the time alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.inputs import find_units
from data_prep.output import ShardSeries, staged
from data_prep.readers import BadRecords, read_documents
from megalite.errors import CommandError, DataError
from megalite.files import sync_directory, sync_file
from megalite.formats.index import Dtype, Integers, dtype_for
from megalite.formats.manifest import Manifest, SourceInfo, TokenizerInfo, write_manifest
from megalite.formats.tokenizer import Tokenizer, check_round_trip, load_tokenizer
from megalite.log import logger

# Encoded at once: enough for every thread, and little enough to stay in the cache's reach.
_BATCH_CHARACTERS = 4 << 20
_REPORT_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class TokenizeOptions:
    """The arguments of `tokenize`."""

    inputs: tuple[str, ...]
    tokenizer: str
    output: Path
    text_field: str = "text"
    shard_tokens: int = 100_000_000
    workers: int = 1
    max_bad_records: int = 0
    bos: bool = False
    eos: bool = True

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: all that the shards depend on."""
        return {
            "input": list(self.inputs),
            "tokenizer": self.tokenizer,
            "text_field": self.text_field,
            "shard_tokens": self.shard_tokens,
            "max_bad_records": self.max_bad_records,
            "bos": self.bos,
            "eos": self.eos,
        }


@dataclass
class Batch:
    """Documents in order, each with the number of its --input."""

    sources: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def tokenize(options: TokenizeOptions) -> Manifest:
    """Encode all documents of the input into a new shard folder.

    Raises:
        CommandError: an input that names nothing, an output that is taken.
        DataError: a tokenizer or a file that cannot be used, too many bad records, no document.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    check_round_trip(tokenizer)
    before = _control(tokenizer.bos_id, "BOS", "leave --bos out") if options.bos else None
    after = _control(tokenizer.eos_id, "EOS", "pass --no-eos") if options.eos else None
    reading = _Reading(options)
    with staged(options.output) as staging:
        dtype = dtype_for(tokenizer.vocab_size)
        wrap = _wrapper(before, after)
        with ShardSeries(
            staging, dtype, vocab_size=tokenizer.vocab_size, shard_tokens=options.shard_tokens
        ) as series:
            for batch in reading.batches():
                encoded = tokenizer.encode_batch(batch.texts, threads=options.workers)
                for source, ids in zip(batch.sources, encoded, strict=True):
                    document = wrap(ids)
                    series.add_document(document)
                    reading.count(source, document.size)
        manifest = _manifest(options, tokenizer, dtype, series, reading)
        manifest = manifest.model_copy(
            update={"bos": before, "eos": after, "tokenizer": _save(tokenizer, staging)}
        )
        write_manifest(staging, manifest)
    return manifest
