"""Train a small model on the sources of Python's standard library, for `make smoke`.

Tokenizer and shards stay in data/smoke, and later calls use them. Each call replaces runs/smoke.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

DATA, RUN, CONFIG = Path("data/smoke"), Path("runs/smoke"), Path("configs/smoke.json")
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
MAX_PERPLEXITY = 40
PROMPT = "class Reader:\n    def __init__(self, name):\n        self."
SAMPLE = ("--checkpoint", str(RUN), "--prompt", PROMPT, "--temperature", "0.9", "--top-k", "20")


def collect(stdlib: Path, folder: Path) -> str:
    """Write train.jsonl and valid.jsonl, with a record per source file, and describe them.

    About one file in 40 is held out.
    """
    splits: dict[str, list[str]] = {"train": [], "valid": []}
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib).as_posix()
        text = path.read_bytes().decode("utf-8", errors="ignore").replace("\0", "")
        if text and not EXCLUDED & set(name.split("/")):
            held_out = hashlib.sha256(name.encode()).digest()[0] % 40 == 0
            splits["valid" if held_out else "train"].append(json.dumps({"text": text}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return f"{len(splits['train'])} files to train on, {len(splits['valid'])} held out"


def run(*command: str, capture: bool = True) -> str:
    """Return a command's standard output. If it fails, exit with all of its output.

    Args:
        capture: If false, the command writes to the terminal, and the result is empty.
    """
    done = subprocess.run(command, text=True, capture_output=capture)
    if done.returncode:
        sys.exit(f"{done.stdout or ''}{done.stderr or ''}failed: {' '.join(command)}")
    return done.stdout or ""


def prepare(output: Path, *arguments: str) -> str:
    """Run a data_prep command, unless its output exists. An output is complete or absent."""
    if not output.exists():
        run(sys.executable, "-m", "data_prep", *arguments, "--output", str(output))
    return str(output)


def train() -> str:
    """Train a new run, and describe it.

    The number of ranks divides the global batch, and is at most the number of GPUs and at most 8.
    Without GPUs it is at most 2.
    """
    import torch

    from megalite.config import load_config

    training = load_config(CONFIG).training
    count = min(torch.cuda.device_count(), 8) or 2
    ranks = max(n for n in range(1, count + 1) if training.global_batch_size % n == 0)
    micro_batch = min(training.global_batch_size // ranks, training.micro_batch_size)
    shutil.rmtree(RUN, ignore_errors=True)
    command = f"--num_gpus {ranks} --quiet launcher/pretrain.py --config {CONFIG}".split()
    setting = f"training.micro_batch_size={micro_batch}"
    run(f"{sys.prefix}/bin/deepspeed", *command, "--set", setting, capture=False)
    # deepspeed also returns 0 if a signal killed it, so the state is read from status.json
    status = json.loads((RUN / "status.json").read_text())
    rows = map(json.loads, (RUN / "metrics.jsonl").read_text().splitlines())
    valid = [row for row in rows if row["kind"] == "valid"]
    perplexities = [row["perplexity"] for row in valid]
    if status["state"] != "done" or not (perplexities[-1] and perplexities[-1] < MAX_PERPLEXITY):
        sys.exit(
            f"expected state done and a held-out perplexity under {MAX_PERPLEXITY}, "
            f"got {status} and perplexities {perplexities}; read {RUN}/log.txt"
        )
    return (
        f"{ranks} ranks, held-out perplexity {perplexities[0]:,.0f} -> {perplexities[-1]:.1f}, "
        f"{bits_per_byte(valid[-1]['loss']):.2f} bits per byte"
    )


def bits_per_byte(loss: float) -> float:
    """Convert the held-out loss, in nats per token, to bits per byte of the text."""
    with (DATA / "corpus/valid.jsonl").open() as lines:
        size = sum(len(json.loads(line)["text"].encode()) for line in lines)
    tokens = json.loads((DATA / "valid/manifest.json").read_text())["tokens"]
    return loss / math.log(2) * int(tokens) / size


def main() -> None:
    if not (root := Path(__file__).resolve().parent.parent).joinpath("Makefile").is_file():
        sys.exit("smoke.py needs a checkout; clone MegaLite, and start `make smoke` there")
    os.chdir(root)
    corpus = DATA / "corpus"
    train_tokenizer = f"train-tokenizer --vocab-size 8000 --input {corpus}/train.jsonl".split()
    tokenize = f"tokenize --tokenizer {DATA}/tokenizer --input".split()
    steps: dict[str, tuple[str, Callable[[], str]]] = {
        "corpus": (
            "read the sources of Python's standard library",
            lambda: collect(Path(sysconfig.get_path("stdlib")), corpus),
        ),
        "tokenizer": (
            "train a SentencePiece tokenizer with 8,000 pieces",
            lambda: prepare(DATA / "tokenizer", *train_tokenizer),
        ),
        "train": (
            "write the training text as shards of token ids",
            lambda: prepare(DATA / "train", *tokenize, f"{corpus}/train.jsonl"),
        ),
        "valid": (
            "write the held-out text as shards of token ids",
            lambda: prepare(DATA / "valid", *tokenize, f"{corpus}/valid.jsonl"),
        ),
        "pretrain": ("load PyTorch, then train a small decoder", train),
        "generate": (
            "load the checkpoint and continue a prompt",
            lambda: run(sys.executable, "launcher/generate.py", *SAMPLE),
        ),
    }
    for name, (description, step) in steps.items():
        sys.stdout.write(f"{name:<10} {description}\n")
        sys.stdout.flush()
        start = time.monotonic()
        result = step()
        sys.stdout.write(f"{name:<10} {time.monotonic() - start:6.1f} s  {result}\n")
    sys.stdout.write(f"the run is {RUN}\nto view it: {sys.prefix}/bin/tensorboard --logdir {RUN}\n")


if __name__ == "__main__":
    main()
