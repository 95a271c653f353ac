"""Measure the time from a command to the end of its first training step.

Each round times these commands, one after another and each in a new process:

    imports    python -c "import torch, deepspeed", the minimum for any program that uses both
    first      launcher/pretrain.py on a tiny model, until the end of its first step
    resume     the same from a checkpoint, until the end of its first step
    help       launcher/pretrain.py --help

The output has medians over the rounds. It also has the time of `first` and of `resume` beyond that
of `imports`.
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from train import make_data

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = str(ROOT / "launcher" / "pretrain.py")
MODEL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        make_data(Path(folder) / "data", MODEL, samples=64)
        for number in range(arguments.rounds):
            rows.append(measure(Path(folder), f"run-{number}"))
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    for name in ("first", "resume"):
        medians[f"{name} over imports"] = statistics.median(r[name] - r["imports"] for r in rows)
    if arguments.json:
        sys.stdout.write(json.dumps(medians | {"rounds": rows}) + "\n")
    else:
        sys.stdout.write("\n".join(f"{name:20} {s:6.2f} s" for name, s in medians.items()) + "\n")


def measure(folder: Path, name: str) -> dict[str, float]:
    """Run one round. Return the seconds of each command."""
    run = {
        "name": name,
        "model": MODEL,
        "data": {"train": [{"path": str(folder / "data")}], "sequence_length": 64},
        "optimizer": {"lr": 1e-4},
        "training": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 4, "log_every": 1},
        "logging": {"directory": str(folder / "runs")},
    }
    path = folder / "run.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    times = {"imports": seconds([sys.executable, "-c", "import torch, deepspeed"])}
    command = [sys.executable, PRETRAIN, "--config", str(path)]
    for number, start in enumerate(("first", "resume")):
        began = time.time()
        seconds([*command, "--set", f"training.steps={number + 1}"])
        lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        [row] = [
            r for r in map(json.loads, lines) if (r["kind"], r["step"]) == ("train", number + 1)
        ]
        times[start] = row["time"] - began
    return times | {"help": seconds([sys.executable, PRETRAIN, "--help"])}


def seconds(command: list[str]) -> float:
    """Run a command and return its duration."""
    began = time.perf_counter()
    environ = os.environ | {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    subprocess.run(command, cwd=ROOT, env=environ, check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
