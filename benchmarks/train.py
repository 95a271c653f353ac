"""Training speed through the front door, next to other frameworks on the same machine.

    python benchmarks/train.py                          the 42 M shape, three rounds
    python benchmarks/train.py --shape vocab gpt2 --peers /path/to/python --json results.json
    python benchmarks/train.py --precision bf16 --only megalite fp32 hf-compiled
                                                        bf16 on a CPU with AMX or AVX512-BF16
    python benchmarks/train.py --shape smoke --steps 60 --only full bare
                                                        what logging and saving cost

In every round each contestant is started afresh, one after the other, and takes the same number of
steps on random tokens: batch, clipping at 1.0 and AdamW (fused) are the same for all. The precision
is fp32 on a CPU and bf16 with fp32 masters on a GPU, or --precision; peers use autocast for bf16.
Between them the machine's matrix product is timed in that precision. The first two steps are
warm-up. Ratios are of medians over all rounds. Memory is a process's (a rank's).

    megalite        launcher/pretrain.py: one rank, ZeRO-0 (in bf16 ZeRO-1, which has masters),
                    blocks compiled, logging and TensorBoard
    fp32            the same in fp32 and ZeRO-0, whatever --precision says
    plain           the same without compiling
    full, bare      the same with a save in the background every 20 steps; without saves and
                    TensorBoard, logging three times (give 60 steps)
    zero1           the same as megalite, ZeRO-1
    dp2, tp2        two ranks of half the threads: ZeRO-1, tensor parallelism
    hf, hf-compiled, hf-trainer, litgpt, litgpt-compiled      peers.py, next to this file
"""

from __future__ import annotations

import sys

sys.path.sort(key=lambda path: path.endswith("benchmarks"))  # last, for it has a tokenize.py

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
THREADS = os.cpu_count() or 1
WARM = 2  # first steps omitted

LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
# name: (model, sequences of a step)
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "42m": (LLAMA | {"vocab_size": 32000, "num_hidden_layers": 8}, 8),
    "smoke": (
        LLAMA
        | {"vocab_size": 8000, "num_hidden_layers": 4, "max_position_embeddings": 256}
        | {"hidden_size": 256, "intermediate_size": 704},
        16,
    ),
    "vocab": (LLAMA | {"vocab_size": 131072, "num_hidden_layers": 4}, 4),
    "gpt2": (
        {
            "vocab_size": 50257,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 1024,
            "norm": "layernorm",
            "activation": "gelu_tanh",
            "position_embedding": "learned",
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        4,
    ),
}


@dataclass(frozen=True)
class Contestant:
    """How one is started: ranks, and what its run file adds; or a peer's name."""

    ranks: int = 1
    sections: dict[str, Any] = field(default_factory=dict)
    peer: str = ""


def _stage(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


ZERO_0: dict[str, Any] = {"deepspeed": _stage(0)}
SAVING: dict[str, Any] = {"checkpoint": {"every": 20, "background": True, "keep": 1}}
QUIET: dict[str, Any] = {"logging": {"tensorboard": False}, "training": {"log_every": None}}
CONTESTANTS = {
    "megalite": Contestant(1, ZERO_0),
    "plain": Contestant(1, ZERO_0 | {"training": {"compile": False}}),
    "full": Contestant(1, ZERO_0 | SAVING),
    "bare": Contestant(1, ZERO_0 | QUIET),
    "fp32": Contestant(1, {"deepspeed": _stage(0), "training": {"precision": "fp32"}}),
    "zero1": Contestant(1, {"deepspeed": _stage(1)}),
    "dp2": Contestant(2, {"deepspeed": _stage(1)}),
    "tp2": Contestant(2, {"deepspeed": _stage(1), "parallel": {"tensor": 2}}),
    **{
        name: Contestant(peer=name)
        for name in ("hf", "hf-compiled", "hf-trainer", "litgpt", "litgpt-compiled")
    },
}
USUAL = ["megalite", "hf", "hf-compiled", "hf-trainer", "litgpt-compiled"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["42m"])
    parser.add_argument(
        "--only", nargs="+", choices=CONTESTANTS, default=USUAL, metavar="NAME", help="contestants"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="a contestant takes in a round")
    parser.add_argument("--batch", type=int, help="sequences of a step, instead of the shape's")
    parser.add_argument(
        "--peers",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter that has the peers",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw tokens a second")
    return parser.parse_args()


def main() -> None:
    chosen = parse()
    chosen.precision = chosen.precision or ("bf16" if gpu() else "fp32")
    found = {}
    for shape in chosen.shape:
        found[shape] = result = measure(shape, chosen)
        sys.stdout.write(table(shape, result) + "\n")
        sys.stdout.flush()
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if chosen.plot:
        chosen.plot.write_text(drawing(found), encoding="utf-8")


def measure(shape: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds of one shape."""
    model, batch = SHAPES[shape]
    batch = chosen.batch or batch
    visits: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen.only}
    peaks, faults = list[float](), dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="train-") as scratch:
        folder = Path(scratch)
        make_data(folder / "data", model, samples=batch * (chosen.steps + 1))
        for number in range(chosen.rounds):
            for name in visits:
                if name in faults:
                    continue
                peaks.append(peak(chosen.precision))
                try:
                    row = visit(name, model, batch, chosen, folder / f"{name}-{number}")
                    visits[name].append(row)
                except RuntimeError as error:
                    faults[name] = str(error)
                    sys.stderr.write(f"{name}: {error}\n")
    tokens = batch * model["max_position_embeddings"]
    machine = statistics.median(peaks)
    return {
        "tokens_per_step": tokens,
        "matrix_product": machine,
        "faults": faults,
        "contestants": {
            name: summarise(rows, tokens, flops_per_token(model), machine)
            for name, rows in visits.items()
            if rows
        },
    }


def summarise(
    rows: list[dict[str, Any]], tokens: int, flops: float, machine: float
) -> dict[str, Any]:
    seconds = statistics.median(s for row in rows for s in row["seconds"])
    return {
        "tokens_per_second": tokens / seconds,
        "share_of_peak": tokens / seconds * flops / machine,
        "memory_bytes": statistics.median(row["memory"] for row in rows),
        "first_step_seconds": statistics.median(row["first"] for row in rows),
        "rounds": rows,
    }


def flops_per_token(model: dict[str, Any]) -> float:
    """Of the matrix products of a forward and a backward; attention's causal half; no embedding."""
    from megalite.config import ModelConfig
    from megalite.plan import flops_per_token as of_model

    return of_model(ModelConfig.model_validate(model), model["max_position_embeddings"])


def peak(precision: str) -> float:
    """FLOP/s of a large matrix product: the median over two seconds."""
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    script = f"""
import statistics, time, torch
cuda = torch.cuda.is_available()
torch.set_num_threads({THREADS})
kind = dict(device="cuda" if cuda else "cpu", dtype=torch.{dtype})
size = 8192 if cuda else 2048
a, b = torch.randn(size, size, **kind), torch.randn(size, size, **kind)
rates, end = [], time.perf_counter() + 2
while time.perf_counter() < end:
    began = time.perf_counter()
    c = a @ b
    if cuda: torch.cuda.synchronize()
    rates.append(2 * size**3 / (time.perf_counter() - began))
print(statistics.median(rates))
"""
    command = [sys.executable, "-c", script]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def visit(
    name: str, model: dict[str, Any], batch: int, chosen: argparse.Namespace, place: Path
) -> dict[str, Any]:
    """Time one contestant's steps in a fresh process: seconds each, peak memory, time to the
    first.
    """
    contestant = CONTESTANTS[name]
    log = place.with_suffix(".log")
    if contestant.peer:
        shape = json.dumps(
            {"model": model, "batch": batch, "steps": chosen.steps, "precision": chosen.precision}
        )
        script = str(Path(__file__).with_name("peers.py"))
        command = [chosen.peers, script, contestant.peer, shape]
    else:
        command = ours(contestant, model, batch, chosen, place)
    environ = os.environ | {"OMP_NUM_THREADS": str(max(1, THREADS // contestant.ranks))}
    began = time.time()
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=environ, check=False)
    text = log.read_text(encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"ended with {done.returncode}; its last words: {text[-500:]}")
    if contestant.peer:
        told = json.loads(text.strip().splitlines()[-1])
        ends, memory = told["ends"], told["memory"]
    else:
        lines = (place.parent / "runs" / place.name / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
        memory = max(row["peak_memory_bytes"] for row in rows)
        ends = [row["time"] for row in rows]
        if name in ("full", "bare"):  # whatever happened after the first third, saves included
            third = chosen.steps // 3
            start = next(row["time"] for row in rows if row["step"] == third)
            seconds = [(ends[-1] - start) / (chosen.steps - third)]
            return {"seconds": seconds, "memory": memory, "first": float("nan")}
    seconds = [after - before for before, after in itertools.pairwise(ends)][WARM - 1 :]
    return {"seconds": seconds, "memory": memory, "first": ends[0] - began}


def ours(
    contestant: Contestant,
    model: dict[str, Any],
    batch: int,
    chosen: argparse.Namespace,
    place: Path,
) -> list[str]:
    """Return the command of a run through the front door; its file is written."""
    steps, folder = chosen.steps, place.parent
    run: dict[str, Any] = {
        "name": place.name,
        "model": model,
        "data": {
            "train": [{"path": str(folder / "data")}],
            "sequence_length": model["max_position_embeddings"],
        },
        "optimizer": {"name": "adamw", "lr": 1e-4, "clip_grad_norm": 1.0},
        "schedule": {"name": "constant"},
        "training": {
            "steps": steps,
            "global_batch_size": batch,
            "micro_batch_size": batch // (contestant.ranks // _tensor(contestant)),
            "precision": chosen.precision,
            "compile": True,
            "log_every": 1,
        },
        "checkpoint": {"every": 0},
        "logging": {"directory": str(folder / "runs")},
    }
    for section, values in contestant.sections.items():
        run[section] = run.get(section, {}) | values
    run["training"]["log_every"] = run["training"]["log_every"] or max(1, steps // 3)
    if run["training"]["precision"] == "bf16" and run.get("deepspeed") == _stage(0):
        run["deepspeed"] = _stage(1)
    path = folder / f"{place.name}.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    launch = [sys.executable]
    if contestant.ranks > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc-per-node={contestant.ranks}"]
    return [*launch, str(ROOT / "launcher" / "pretrain.py"), "--config", str(path)]


@cache
def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _tensor(contestant: Contestant) -> int:
    return int(contestant.sections.get("parallel", {}).get("tensor", 1))


def make_data(folder: Path, model: dict[str, Any], *, samples: int) -> None:
    """Shards of random ids, documents of a window each."""
    import numpy as np

    from megalite.formats.index import dtype_for
    from megalite.formats.shards import ShardWriter

    folder.mkdir()
    length, vocabulary = model["max_position_embeddings"], model["vocab_size"]
    with ShardWriter(folder, "shard", dtype_for(vocabulary), vocab_size=vocabulary) as writer:
        for seed in range(samples):
            writer.add_document(np.random.default_rng(seed).integers(0, vocabulary, length))
        writer.close()


def table(shape: str, result: dict[str, Any]) -> str:
    machine = result["matrix_product"]
    lines = [
        f"{shape}: {result['tokens_per_step']:,} tokens a step, matrix product "
        f"{machine / 1e9:.0f} GFLOP/s",
        f"{'':16} {'tokens/s':>9} {'of peak':>8} {'memory':>8} "
        f"{'first step':>11} {'megalite is':>12}",
    ]
    first = result["contestants"].get("megalite")
    for name, row in result["contestants"].items():
        rate = row["tokens_per_second"]
        faster = f"{first['tokens_per_second'] / rate:.2f} x" if first else ""
        memory = f"{row['memory_bytes'] / 1e9:.2f} GB"
        began = row["first_step_seconds"]
        started = "" if math.isnan(began) else f"{began:.1f} s"
        lines.append(
            f"{name:16} {rate:9,.0f} {row['share_of_peak']:8.0%} {memory:>8} {started:>11} "
            f"{faster:>12}"
        )
    lines += [f"{name:16} did not run: {why[-200:]}" for name, why in result["faults"].items()]
    return "\n".join(lines)


def drawing(found: dict[str, Any]) -> str:
    """Bars of tokens a second, a group a shape."""
    parts, y = list[str](), 10
    for shape, result in found.items():
        parts.append(f'<text x="10" y="{y + 14}" font-weight="bold">{shape}</text>')
        y += 24
        rows = result["contestants"]
        most = max(row["tokens_per_second"] for row in rows.values())
        for name, row in rows.items():
            rate = row["tokens_per_second"]
            colour = "#8899aa" if CONTESTANTS[name].peer else "#2266cc"
            parts.append(
                f'<text x="10" y="{y + 13}">{name}</text>'
                f'<rect x="130" y="{y}" width="{400 * rate / most:.0f}" height="16" '
                f'fill="{colour}"/><text x="{140 + 400 * rate / most:.0f}" y="{y + 13}">'
                f"{rate:,.0f} tokens/s, {row['memory_bytes'] / 1e9:.1f} GB</text>"
            )
            y += 22
        y += 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {y}" '
        'font-family="sans-serif" font-size="13">\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
