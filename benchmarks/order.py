"""Measure the time and memory to the first batch, for mixtures of 10 T and of 10 M tokens.

Both mixtures are shard folders with manifests and `.idx` files. Their `.bin` files are sparse: they
have the right size, use no disk blocks, and are read as zeros.

A new process opens each mixture as training does, and reads the first step of one of 8 ranks. The
step has 64 of 512 samples of 2,048 tokens, with document masks. The clock starts after all
libraries are loaded. So the time consists of work that depends on the data: reading manifests,
comparing file sizes, computing the order, and reading the first windows. The memory is the
process's peak, minus its memory when the clock starts.
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megalite.config import DataConfig
from megalite.data import Loader, open_train
from megalite.files import sha256_file
from megalite.formats.index import write_index
from megalite.formats.manifest import ShardInfo, ShardManifest, TokenizerInfo

LENGTH, VOCABULARY = 2048, 32_000
BATCH, MICRO_BATCH, RANKS = 512, 8, 8
DOCUMENTS = 100  # per shard
DTYPE = np.dtype("<u2")
# the most that the large mixture may need beyond the small one
TARGET_SECONDS, TARGET_BYTES = 1.0, 50_000_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens",
        type=float,
        default=1e13,
        help="tokens of the large mixture (default: %(default)g)",
    )
    parser.add_argument(
        "--sources",
        type=int,
        default=1000,
        help="sources of the large mixture (default: %(default)s)",
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=10,
        help="shards per source of the large mixture (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="processes per mixture (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="folder for the shards (default: temporary)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_source(folder: Path, tokens: int, shards: int) -> None:
    """Write a shard folder of sparse files, with documents of equal length."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"none")
    length = tokens // (shards * DOCUMENTS)
    infos = []
    for number in range(shards):
        name = f"shard_{number:05d}"
        size = length * DOCUMENTS * DTYPE.itemsize
        (folder / f"{name}.bin").touch()
        os.truncate(folder / f"{name}.bin", size)
        index = folder / f"{name}.idx"
        write_index(index, [length] * DOCUMENTS, range(DOCUMENTS + 1), DTYPE)
        infos.append(
            ShardInfo(
                name=name,
                documents=DOCUMENTS,
                tokens=length * DOCUMENTS,
                bytes=size,
                sha256="0" * 64,  # never compared, because `.bin` files are not hashed here
                index_sha256=sha256_file(index),
            )
        )
    manifest = ShardManifest(
        dtype=DTYPE.name,
        vocab_size=VOCABULARY,
        tokenizer=TokenizerInfo(
            path="tokenizer/tokenizer.model", sha256=hashlib.sha256(b"none").hexdigest()
        ),
        bos=None,
        eos=None,
        documents=shards * DOCUMENTS,
        tokens=sum(info.tokens for info in infos),
        shards=infos,
    )
    (folder / "manifest.json").write_text(json.dumps(manifest.model_dump(mode="json")))


def first_batch(root: Path) -> dict[str, Any]:
    """Read the first step of the mixture below `root`.

    Returns:
        the sizes of the mixture, and the seconds and bytes that this process needed.
    """
    before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    sources = [
        {"path": str(path), "weight": 1.0 + number % 7}
        for number, path in enumerate(sorted(root.iterdir()))
    ]
    config = DataConfig.model_validate(
        {"train": sources, "sequence_length": LENGTH, "mask_documents": True}
    )
    dataset = open_train(config, vocab_size=VOCABULARY)
    opened = time.perf_counter() - begin
    loader = Loader(
        dataset,
        global_batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        data_rank=0,
        data_size=RANKS,
        start=0,
        pin_memory=False,
        prefetch=1,
    )
    step = next(loader)
    spent = time.perf_counter() - begin
    # Linux reports KiB, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    loader.close()
    assert step.targets > 0
    return {
        "sources": len(sources),
        "shards": sum(len(source.manifest.shards) for source in dataset.sources),
        "tokens": sum(source.tokens for source in dataset.sources),
        "open_seconds": opened,
        "seconds": spent,
        "bytes": peak - before,
    }


def measure(root: Path, repeats: int) -> dict[str, Any]:
    """Return medians over new processes, without the first one, which fills the page cache."""
    command = [sys.executable, __file__, "--measure", str(root)]
    rows = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(repeats + 1)
    ][1:]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main() -> int:
    arguments = parse()
    if arguments.measure:
        sys.stdout.write(json.dumps(first_batch(Path(arguments.measure))))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        small, large = Path(temporary) / "small", Path(temporary) / "large"
        write_source(small / "only", 10_000_000, 1)
        for number in range(arguments.sources):
            tokens = int(arguments.tokens) // arguments.sources
            write_source(large / f"source{number:05d}", tokens, arguments.shards)
        rows = {
            "small": measure(small, arguments.repeats),
            "large": measure(large, arguments.repeats),
        }
    more = {key: rows["large"][key] - rows["small"][key] for key in ("seconds", "bytes")}
    ok = more["seconds"] < TARGET_SECONDS and more["bytes"] < TARGET_BYTES
    if arguments.json:
        sys.stdout.write(json.dumps({"ok": ok, **rows, "more": more}) + "\n")
        return int(not ok)
    sys.stdout.write(
        f"{'':8}{'tokens':>12}{'sources':>9}{'shards':>8}{'to first batch':>16}{'memory':>10}\n"
    )
    for name, row in rows.items():
        sys.stdout.write(
            f"{name:8}{row['tokens']:12.3g}{row['sources']:9.0f}{row['shards']:8.0f}"
            f"{row['seconds']:14.3f} s{row['bytes'] / 1e6:7.1f} MB\n"
        )
    sys.stdout.write(
        f"large minus small: {more['seconds']:.3f} s and {more['bytes'] / 1e6:.1f} MB; target: "
        f"under {TARGET_SECONDS:g} s and {TARGET_BYTES / 1e6:g} MB: {'met' if ok else 'missed'}\n"
    )
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
