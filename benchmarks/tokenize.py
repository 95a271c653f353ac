"""Compare the rate of `python -m data_prep tokenize` with that of the tokenizer library alone.

    python benchmarks/tokenize.py                       60 MB of Python's and all packages' sources
    python benchmarks/tokenize.py --input corpus.jsonl.zst --tokenizer data/tok/tokenizer.model
    python benchmarks/tokenize.py --memory              also peak memory, from 20 MB to 1 GB

Every round measures four times, each with the same number of processes:

    raw     SentencePiece alone. Each process has its share of the documents in memory, encodes it,
            and discards the ids. The time is from the common start to the end of the slowest
            process.
    whole   the command from start to end: interpreter, reading, encoding, shards and hashes
    steady  the same command from the first encoded document to the last, as it reports
    peer    a process pool as in Megatron-LM's preprocess_data.py. Workers parse and encode lines,
            and the parent writes. The time is from the start of the pool until all files are
            closed.

A ratio is the time of `raw` divided by another time of the same round. The output has medians over
the rounds.
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

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
TARGETS = {"whole": 0.90, "steady": 0.95}  # smallest ratios
BATCH = 256  # documents per call of the library


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--input", type=Path, help="JSON lines with `text`; default: sources")
    parser.add_argument("--tokenizer", type=Path, help="a .model; default: train 32,000 pieces")
    parser.add_argument("--megabytes", type=float, default=60, help="size of the text; default: 60")
    parser.add_argument("--workers", type=int, default=cores, help="default: the available cores")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--memory", action="store_true", help="measure peak memory by input size")
    parser.add_argument("--memory-megabytes", type=float, nargs="+", default=[20, 200, 1000])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenize-") as name:
        results = measure(arguments, Path(name))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    corpus = folder / "corpus.jsonl"
    size = write_corpus(corpus, arguments.input, arguments.megabytes)
    model = arguments.tokenizer or train(folder, arguments.input)
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("sentencepiece", "numpy")},
        "workers": arguments.workers,
        "text_bytes": size,
        "rounds": [],
    }
    say(f"{size / 1e6:.1f} MB of text, {arguments.workers} processes, {model}")
    for number in range(arguments.rounds):
        order = (measure_raw, measure_ours, measure_peer)
        seconds: dict[str, Any] = {}
        for contestant in order if number % 2 == 0 else order[::-1]:
            seconds |= contestant(corpus, model, folder, arguments.workers)
        if (ours := seconds.pop("tokens")) != (peer := seconds.pop("peer_tokens")):
            sys.exit(f"the command wrote {ours} tokens and the pool {peer}; both must be equal")
        results["rounds"].append(seconds)
        say(f"round {number + 1}: " + ", ".join(f"{n} {s:.2f} s" for n, s in seconds.items()))
    results["medians"] = summarise(results["rounds"], size) if arguments.rounds else {}
    if arguments.memory:
        base = folder / "base.jsonl"  # every size consists of these documents, repeated
        write_corpus(base, arguments.input, min(arguments.memory_megabytes))
        results["memory"] = [
            measure_memory(folder, base, model, arguments.workers, megabytes)
            for megabytes in arguments.memory_megabytes
        ]
    return results


def summarise(rounds: list[dict[str, float]], size: int) -> dict[str, dict[str, float]]:
    """Return medians over the rounds, and print them as a table."""
    table = {}
    say(f"\n{'':8s}{'seconds':>9s}{'MB/s':>9s}{'of raw':>9s}")
    for name in rounds[0]:
        seconds = statistics.median(row[name] for row in rounds)
        ratio = statistics.median(row["raw"] / row[name] for row in rounds)
        table[name] = {"seconds": seconds, "mb_per_second": size / 1e6 / seconds, "of_raw": ratio}
        target = f"   (target: {TARGETS[name]:.2f} or more)" if name in TARGETS else ""
        say(f"{name:8s}{seconds:9.2f}{size / 1e6 / seconds:9.2f}{ratio:9.3f}{target}")
    return table


# text


def write_corpus(path: Path, source: Path | None, megabytes: float) -> int:
    """Write JSON lines with `megabytes` of text, and return the bytes of text.

    Documents are repeated if the source is smaller.
    """
    size = 0
    with path.open("w") as file:
        for text in cycle(documents(source)):
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return size
    sys.exit("the input contains no documents; give --input a file of JSON lines with `text`")


def documents(source: Path | None) -> Iterator[str]:
    """Yield the texts of a JSON lines file.

    Without a file, yield the sources of Python and of the installed packages.
    """
    if source:
        with pa.input_stream(str(source), compression="detect") as stream:
            yield from (json.loads(line)["text"] for line in read_lines(stream))
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
    """Train a SentencePiece BPE with 32,000 pieces on 20 MB of the text, with `data_prep`."""
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
    shares, start, results = divide(corpus, workers), mp.Barrier(workers), mp.Queue()
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


def divide(corpus: Path, workers: int) -> list[set[int]]:
    """Divide the lines evenly. Return the line numbers of each process.

    Lines are assigned by length, the longest first, each to the process with the smallest load.
    """
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
    """Encode some lines of the corpus. Put the times of start and end into `results`."""
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
    """Time the command in a new process."""
    output = folder / "shards"
    began = time.monotonic()
    command = tokenize_command(corpus, model, output, workers)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    whole = time.monotonic() - began
    steady = STEADY.search(done.stderr)
    if done.returncode or not steady:
        sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{done.stderr}")
    tokens = json.loads((output / "manifest.json").read_text())["tokens"]
    shutil.rmtree(output)
    return {"whole": whole, "steady": float(steady[2]), "tokens": tokens}


def tokenize_command(corpus: Path, model: Path, output: Path, workers: int) -> list[str]:
    command = [sys.executable, "-m", "data_prep", "tokenize", "--input", str(corpus)]
    command += ["--tokenizer", str(model.resolve()), "--output", str(output)]
    return [*command, "--workers", str(workers)]


# peer

_processor: Any = None


def measure_peer(corpus: Path, model: Path, folder: Path, workers: int) -> dict[str, float]:
    """Time a pool whose parent process writes, as in Megatron-LM's preprocess_data.py."""
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
    """Return the peak memory of all processes of the command, sampled 20 times per second.

    `private` does not count mapped files and pages that processes share.
    """
    corpus, output = folder / "memory.jsonl", folder / "memory"
    size = write_corpus(corpus, base, megabytes)
    command = tokenize_command(corpus, model, output, workers)
    peak = {"resident": 0, "private": 0}
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, stdout=null, stderr=null)
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, peak, ended))
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code:
        sys.exit(f"{' '.join(command)}\nended with exit code {code}")
    shutil.rmtree(output)
    corpus.unlink()
    say(
        f"memory for {size / 1e6:7.1f} MB of text: {peak['resident'] / 1e6:6.0f} MB resident, "
        f"{peak['private'] / 1e6:6.0f} MB private"
    )
    return {"text_bytes": size, **peak}


def watch(pid: int, peak: dict[str, int], ended: threading.Event) -> None:
    """Update the peak memory of a process and its children until the process has ended."""
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
