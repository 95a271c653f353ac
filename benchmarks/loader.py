"""Measure how many tokens per second the training loader delivers on one core, from the page cache.

The mixture has ten sources. Documents have 500 tokens on average, and windows have 2,048. Documents
in a window are masked from each other. The process may use one core only, which the loader's thread
and the thread that takes the batches share.
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from megalite.data import Dataset, Loader
from megalite.formats.manifest import ShardManifest, TokenizerInfo, write_manifest
from megalite.formats.shards import ShardWriter, open_shards

SOURCES, LENGTH, DOCUMENT, VOCABULARY = 10, 2048, 500, 32_000
SHARDS = 3  # per source


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens",
        type=int,
        default=200_000_000,
        help="tokens of all sources (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="per measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="number of measurements (default: %(default)s)"
    )
    parser.add_argument(
        "--global-batch-size", type=int, default=512, help="samples per step (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse_args()


def make_source(folder: Path, tokens: int, seed: int) -> None:
    """Write a shard folder of random ids, with exponentially distributed document lengths."""
    generator = np.random.default_rng(seed)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"none")
    infos = []
    for shard in range(SHARDS):
        name = f"shard_{shard:05d}"
        with ShardWriter(folder, name, np.dtype("<u2"), vocab_size=VOCABULARY) as writer:
            lengths = generator.exponential(DOCUMENT, tokens // SHARDS // DOCUMENT).astype(int) + 1
            for length in lengths.tolist():
                writer.add_document(generator.integers(VOCABULARY, size=length, dtype=np.uint16))
            infos.append(writer.close())
    digest = hashlib.sha256(b"none").hexdigest()
    manifest = ShardManifest(
        dtype="uint16",
        vocab_size=VOCABULARY,
        tokenizer=TokenizerInfo(path="tokenizer/tokenizer.model", sha256=digest),
        bos=None,
        eos=None,
        documents=sum(info.documents for info in infos),
        tokens=sum(info.tokens for info in infos),
        shards=infos,
    )
    write_manifest(folder, manifest)


def measure(dataset: Dataset, batch: int, seconds: float, start: int) -> tuple[float, float, int]:
    """Read batches for some seconds.

    Returns:
        tokens per second, tokens per second of processor time, and the position in the data order
        after the last step.
    """
    loader = Loader(
        dataset,
        global_batch_size=batch,
        micro_batch_size=8,
        data_rank=0,
        data_size=1,
        start=start,
        pin_memory=False,
    )
    next(loader)
    for _ in range(2):  # steps that were read ahead before the clock starts
        next(loader)
    steps, begin, processor = 0, time.perf_counter(), time.process_time()
    while (spent := time.perf_counter() - begin) < seconds:
        for step in islice(loader, 4):
            assert len(step.micro_batches) == batch // 8
        steps += 4
    processor = time.process_time() - processor
    loader.close()
    tokens = steps * batch * LENGTH
    return tokens / spent, tokens / processor, start + (steps + 3) * batch


def main() -> None:
    arguments = parse()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / f"source{number}" for number in range(SOURCES)]
        for number, folder in enumerate(folders):
            make_source(folder, arguments.tokens // SOURCES, number)
        dataset = Dataset(
            [open_shards(folder) for folder in folders],
            [1 + number for number in range(SOURCES)],
            sequence_length=LENGTH,
            seed=1,
            mask_documents=True,
        )
        # A first pass fills the page cache and opens every index.
        *_, place = measure(dataset, arguments.global_batch_size, 2.0, 0)
        rates, processor_rates = [], []
        for _ in range(arguments.repeats):
            rate, processor_rate, place = measure(
                dataset, arguments.global_batch_size, arguments.seconds, place
            )
            rates.append(rate)
            processor_rates.append(processor_rate)
    result = {
        "tokens_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        # the rate if no other process uses the core
        "tokens_per_processor_second": statistics.median(processor_rates),
        "sequence_length": LENGTH,
        "sources": SOURCES,
        "tokens": arguments.tokens,
        "mask_documents": True,
        "cores": 1,
        "machine": platform.processor() or platform.machine(),
    }
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    low, middle, high = (
        f"{result[key] / 1e6:.1f}" for key in ("lowest", "tokens_per_second", "highest")
    )
    sys.stdout.write(
        f"{middle} M tokens/s on one core (median of {len(rates)}, {low} to {high}): {SOURCES} "
        f"sources, windows of {LENGTH}, documents of {DOCUMENT} tokens with document masks; "
        f"{result['tokens_per_processor_second'] / 1e6:.1f} M tokens/s of processor time\n"
    )


if __name__ == "__main__":
    main()
