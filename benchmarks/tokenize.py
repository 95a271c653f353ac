"""How close `python -m data_prep tokenize` comes to the tokenizer library's own rate.

    python benchmarks/tokenize.py                       60 MB of the sources of what is installed
    python benchmarks/tokenize.py --input corpus.jsonl.zst --tokenizer data/tok/tokenizer.model
    python benchmarks/tokenize.py --memory              peak memory from 20 MB to 1 GB, as well

Four figures, measured in turn in every round, with W processes each:

    raw     SentencePiece alone: each process has its share of the documents in memory, encodes it,
            and drops the ids. From the common start to the end of the slowest process.
    whole   the command, from its start to its end: interpreter, reading, encoding, shards, hashes.
    steady  the same command, from the first document encoded to the last one, as it reports.
    peer    a process pool as in Megatron-LM's preprocess_data.py: workers parse and encode lines,
            the parent writes. From the pool's start to the last file closed.

A ratio is the time of raw over the time of the other, in the same round; medians are printed.
"""

from __future__ import annotations

import sys

sys.path.sort(key=lambda path: path.endswith("benchmarks"))  # last, for it has a tokenize.py

import argparse
import heapq
import json
import multiprocessing as mp
import os
import platform
import re
import shutil
import site
import statistics
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
STEADY = re.compile(r"encoded ([0-9.]+) MB in ([0-9.]+) s")
TARGETS = {"whole": 0.90, "steady": 0.95}
BATCH = 256  # documents handed to the library at once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--input", type=Path, help="JSON lines with `text`; default: sources")
    parser.add_argument("--tokenizer", type=Path, help="a .model; default: 32,000 pieces, trained")
    parser.add_argument("--megabytes", type=float, default=60, help="of text; default: 60")
    parser.add_argument("--workers", type=int, default=cores, help="default: the cores at hand")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--memory", action="store_true", help="measure peak memory by input size")
    parser.add_argument("--memory-megabytes", type=float, nargs="+", default=[20, 200, 1000])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenize-") as name:
        found = measure(chosen, Path(name))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    corpus = folder / "corpus.jsonl"
    size = write_corpus(corpus, chosen.input, chosen.megabytes)
    model = chosen.tokenizer or train(folder, chosen.input)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("sentencepiece", "numpy")},
        "workers": chosen.workers,
        "text_bytes": size,
        "rounds": [],
    }
    say(f"{size / 1e6:.1f} MB of text, {chosen.workers} processes, {model}")
    for number in range(chosen.rounds):
        order = (measure_raw, measure_ours, measure_peer)
        seconds: dict[str, Any] = {}
        for measured in order if number % 2 == 0 else order[::-1]:
            seconds |= measured(corpus, model, folder, chosen.workers)
        if (ours := seconds.pop("tokens")) != (peer := seconds.pop("peer_tokens")):
            sys.exit(f"the command wrote {ours} tokens and the pool {peer}: one of them is wrong")
        found["rounds"].append(seconds)
        say(f"round {number + 1}: " + ", ".join(f"{n} {s:.2f} s" for n, s in seconds.items()))
    found["medians"] = summarise(found["rounds"], size) if chosen.rounds else {}
    if chosen.memory:
        base = folder / "base.jsonl"  # the same documents at every size, repeated
        write_corpus(base, chosen.input, min(chosen.memory_megabytes))
        found["memory"] = [
            measure_memory(folder, base, model, chosen.workers, megabytes)
            for megabytes in chosen.memory_megabytes
        ]
    return found


def summarise(rounds: list[dict[str, float]], size: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, printed as a table."""
    table = {}
    say(f"\n{'':8s}{'seconds':>9s}{'MB/s':>9s}{'of raw':>9s}")
    for name in rounds[0]:
        seconds = statistics.median(found[name] for found in rounds)
        ratio = statistics.median(found["raw"] / found[name] for found in rounds)
        table[name] = {"seconds": seconds, "mb_per_second": size / 1e6 / seconds, "of_raw": ratio}
        goal = f"   (at least {TARGETS[name]:.2f} is meant)" if name in TARGETS else ""
        say(f"{name:8s}{seconds:9.2f}{size / 1e6 / seconds:9.2f}{ratio:9.3f}{goal}")
    return table


# The text


def write_corpus(path: Path, source: Path | None, megabytes: float) -> int:
    """JSON lines of so much text, in documents repeated if there are too few; its bytes."""
    size = 0
    with path.open("w") as file:
        for text in cycle(documents(source)):
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return size
    sys.exit("there is no text to measure with")


def documents(source: Path | None) -> Iterator[str]:
    """Yield the records of a file of JSON lines, else the sources of Python and what is
    installed.
    """
    if source:
        with pa.input_stream(str(source), compression="detect") as packed:
            yield from (json.loads(line)["text"] for line in read_lines(packed))
        return
    folders = [sysconfig.get_paths()["stdlib"], *site.getsitepackages()]
    paths = {path for folder in folders for path in Path(folder).rglob("*")}
    for path in sorted(path for path in paths if path.suffix in (".py", ".rst", ".md")):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text and "\0" not in text:
            yield text


def read_lines(stream: Any) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def train(folder: Path, source: Path | None) -> Path:
    """Return a SentencePiece BPE of 32,000 pieces from 20 MB of the text, by the project's own
    command.
    """
    sample, output = folder / "sample.jsonl", folder / "tokenizer"
    write_corpus(sample, source, 20)
    command = [sys.executable, "-m", "data_prep", "train-tokenizer", "--input", str(sample)]
    command += ["--vocab-size", "32000", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True)
    sample.unlink()
    return output / "tokenizer.model"


# raw


def measure_raw(corpus: Path, model: Path, folder: Path, workers: int) -> dict[str, float]:
    """Time the library alone."""
    del folder
    shares, start, results = deal(corpus, workers), mp.Barrier(workers), mp.Queue()
    processes = [
        mp.Process(target=encode_share, args=(corpus, model, share, start, results))
        for share in shares
    ]
    for process in processes:
        process.start()
    spans = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {"raw": max(ended for _, ended in spans) - min(began for began, _ in spans)}


def deal(corpus: Path, workers: int) -> list[set[int]]:
    """Return line numbers for each process: the longest first, each to the one that has least."""
    with corpus.open("rb") as file:
        sizes = sorted(((len(line), number) for number, line in enumerate(file)), reverse=True)
    shares: list[set[int]] = [set() for _ in range(workers)]
    loads = [(0, worker) for worker in range(workers)]
    for size, number in sizes:
        load, worker = loads[0]
        shares[worker].add(number)
        heapq.heapreplace(loads, (load + size, worker))
    return shares


def encode_share(corpus: Path, model: Path, share: set[int], start: Any, results: Any) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    with corpus.open("rb") as file:
        texts = [json.loads(line)["text"] for number, line in enumerate(file) if number in share]
    batches = [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)]
    processor.encode(texts[:1], return_type="numpy", num_threads=1)
    start.wait()
    began = time.monotonic()
    for batch in batches:
        processor.encode(batch, return_type="numpy", num_threads=1)
    results.put((began, time.monotonic()))


# whole and steady


def measure_ours(corpus: Path, model: Path, folder: Path, workers: int) -> dict[str, float]:
    """Run the command in a fresh process and return its figures."""
    output = folder / "shards"
    began = time.monotonic()
    command = tokenize_command(corpus, model, output, workers)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    whole = time.monotonic() - began
    found = STEADY.search(done.stderr)
    if done.returncode or not found:
        sys.exit(f"{' '.join(command)}\nleft with {done.returncode}:\n{done.stderr}")
    tokens = json.loads((output / "manifest.json").read_text())["tokens"]
    shutil.rmtree(output)
    return {"whole": whole, "steady": float(found[2]), "tokens": tokens}


def tokenize_command(corpus: Path, model: Path, output: Path, workers: int) -> list[str]:
    command = [sys.executable, "-m", "data_prep", "tokenize", "--input", str(corpus)]
    command += ["--tokenizer", str(model.resolve()), "--output", str(output)]
    return [*command, "--workers", str(workers)]


# peer

_processor: Any = None


def measure_peer(corpus: Path, model: Path, folder: Path, workers: int) -> dict[str, float]:
    """Time a pool whose parent writes, as in Megatron-LM's tool."""
    path, lengths = folder / "peer.bin", []
    began = time.monotonic()
    with mp.Pool(workers, load_model, (str(model),)) as pool, corpus.open() as lines:
        with path.open("wb") as file:
            for ids in pool.imap(encode_line, lines, 32):
                lengths.append(len(ids))
                file.write(np.array(ids, np.uint16).tobytes())
        np.array(lengths, np.int32).tofile(folder / "peer.idx")
    return {"peer": time.monotonic() - began, "peer_tokens": sum(lengths)}


def load_model(model: str) -> None:
    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_file=model)


def encode_line(line: str) -> list[int]:
    ids: list[int] = _processor.encode(json.loads(line)["text"])
    return [*ids, _processor.eos_id()]


# memory


def measure_memory(
    folder: Path, base: Path, model: Path, workers: int, megabytes: float
) -> dict[str, float]:
    """Sample the memory that the command's processes hold together, 20 times a second.

    `private` omits pages of mapped files and what processes share.
    """
    corpus, output = folder / "memory.jsonl", folder / "memory"
    size = write_corpus(corpus, base, megabytes)
    command = tokenize_command(corpus, model, output, workers)
    peak = {"resident": 0, "private": 0}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet)
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, peak, ended))
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code:
        sys.exit(f"{' '.join(command)}\nleft with {code}")
    shutil.rmtree(output)
    corpus.unlink()
    say(
        f"memory for {size / 1e6:7.1f} MB of text: {peak['resident'] / 1e6:6.0f} MB resident, "
        f"{peak['private'] / 1e6:6.0f} MB private"
    )
    return {"text_bytes": size, **peak}


def watch(pid: int, peak: dict[str, int], ended: threading.Event) -> None:
    while not ended.wait(0.05):
        resident = private = 0
        try:
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                memory = process.memory_info()
                resident += memory.rss
                private += memory.rss - getattr(memory, "shared", 0)
        except psutil.NoSuchProcess:
            continue
        peak["resident"] = max(peak["resident"], resident)
        peak["private"] = max(peak["private"], private)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
