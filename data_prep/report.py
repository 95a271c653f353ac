"""`verify` and `inspect`: is a shard folder what it says, and what is in it?"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from megalite.errors import CommandError
from megalite.formats.shards import ShardSet, open_shards, verify_folder
from megalite.formats.tokenizer import load_tokenizer


def verify(folder: Path) -> int:
    """Name everything that is wrong with a shard folder; 1 if there is something, else 0."""
    faults = verify_folder(folder)
    for fault in faults:
        sys.stdout.write(f"{fault}\n")
    if not faults:
        manifest = open_shards(folder).manifest
        sys.stdout.write(
            f"{folder}: {len(manifest.shards)} shards, {manifest.documents:,} documents, "
            f"{manifest.tokens:,} tokens, all as written\n"
        )
    return 1 if faults else 0


def inspect(folder: Path, document: int | None) -> int:
    """Print what a shard folder holds, or one document of it as text."""
    shards = open_shards(folder)
    sys.stdout.write(_summary(shards) if document is None else _document(shards, document))
    return 0


def _summary(shards: ShardSet) -> str:
    manifest = shards.manifest
    lengths = [shards.document_lengths(number) for number in range(len(manifest.shards))]
    longest = max((int(found.max(initial=0)) for found in lengths), default=0)
    shortest = min((int(found.min(initial=longest)) for found in lengths), default=0)
    size = sum(source.bytes for source in manifest.sources)
    tokenizer = manifest.tokenizer
    rows = [
        ("documents", f"{manifest.documents:,}"),
        ("tokens", f"{manifest.tokens:,} as {manifest.dtype}"),
        (
            "tokens a document",
            f"{shortest:,} to {longest:,}, "
            f"mean {manifest.tokens / max(manifest.documents, 1):,.1f}",
        ),
        ("text", f"{size:,} bytes, {size / max(manifest.tokens, 1):.2f} a token"),
        ("vocabulary", f"{manifest.vocab_size:,} ids, BOS {manifest.bos}, EOS {manifest.eos}"),
        ("tokenizer", f"{tokenizer.path} {tokenizer.sha256[:12]}"),
        ("fingerprint", shards.fingerprint),
    ]
    for shard in manifest.shards:
        rows.append((shard.name, f"{shard.documents:,} documents, {shard.tokens:,} tokens"))
    for source in manifest.sources:
        note = f", {source.bad_records:,} bad records" if source.bad_records else ""
        rows.append(("from", f"{source.input}: {source.documents:,} documents{note}"))
    return "".join(f"{name:18s} {value}\n" for name, value in rows)


def _document(shards: ShardSet, number: int) -> str:
    if not 0 <= number < shards.documents:
        raise CommandError(
            f"--document {number}: {shards.folder} has {shards.documents} documents, 0 to "
            f"{shards.documents - 1}"
        )
    tokenizer = load_tokenizer(shards.folder / shards.manifest.tokenizer.path)
    ids = shards.document(number)
    return tokenizer.decode(np.asarray(ids, np.int64).tolist()) + "\n"
