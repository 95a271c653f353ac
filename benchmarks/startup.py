"""How long a command takes to get going: from the shell to the end of its first step.

Each round times, one after the other and in fresh processes,

    imports    python -c "import torch, deepspeed": what any program on this stack pays
    first      launcher/pretrain.py on a tiny model, from the command to its first step's end
    resume     the same again, going on from a checkpoint
    help       launcher/pretrain.py --help

and prints medians, and by how much the second and third are over the first.
"""

from __future__ import annotations

import sys

sys.path.sort(key=lambda path: path.endswith("benchmarks"))  # last, for it has a tokenize.py

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
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        make_data(Path(folder) / "data", MODEL, samples=64)
        for number in range(chosen.rounds):
            rows.append(measure(Path(folder), f"run-{number}"))
    found = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    for name in ("first", "resume"):
        found[f"{name} over imports"] = statistics.median(r[name] - r["imports"] for r in rows)
    if chosen.json:
        sys.stdout.write(json.dumps(found | {"rounds": rows}) + "\n")
    else:
        sys.stdout.write("\n".join(f"{name:20} {s:6.2f} s" for name, s in found.items()) + "\n")


def measure(folder: Path, name: str) -> dict[str, float]:
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
    for number, what in enumerate(("first", "resume")):
        began = time.time()
        seconds([*command, "--set", f"training.steps={number + 1}"])
        lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        [row] = [
            r for r in map(json.loads, lines) if (r["kind"], r["step"]) == ("train", number + 1)
        ]
        times[what] = row["time"] - began
    return times | {"help": seconds([sys.executable, PRETRAIN, "--help"])}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    environ = os.environ | {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    subprocess.run(command, cwd=ROOT, env=environ, check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
