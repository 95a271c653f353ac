"""Compare the training speed of launcher/pretrain.py with that of other frameworks.

    python benchmarks/train.py                          the 42 M shape, three rounds
    python benchmarks/train.py --shape vocab gpt2 --peers /path/to/python --json results.json
    python benchmarks/train.py --precision bf16 --only megalite fp32 hf-compiled
                                                        bf16 on a CPU with AMX or AVX512-BF16
    python benchmarks/train.py --shape smoke --steps 60 --only full bare
                                                        the cost of logging and saving

In every round, each contestant runs in a new process, one after another. All take the same number
of steps on random tokens, with the same batch, clipping at 1.0 and fused AdamW. Without
--precision, a CPU trains in fp32, and a GPU in bf16 with fp32 masters. The other frameworks use
autocast for bf16. Before each contestant, a matrix product is timed in the same precision. The
first two steps are not counted. Speed-ups are ratios of medians over all rounds. Memory is per
process.

    megalite        launcher/pretrain.py with one rank, compiled blocks, logging and TensorBoard.
                    ZeRO-0, or in bf16 ZeRO-1, which has fp32 masters.
    fp32            megalite in fp32 with ZeRO-0, for any --precision
    plain           megalite without compilation
    full            megalite with a background save every 20 steps (use --steps 60)
    bare            megalite without saves and TensorBoard, logging three times (use --steps 60)
    zero1           megalite with ZeRO-1
    dp2             two ranks with half of the threads each: ZeRO-1
    tp2             two ranks with half of the threads each: tensor parallelism
    hf, hf-compiled, hf-trainer, litgpt, litgpt-compiled      other frameworks: see peers.py
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS, DEFAULT, SHAPES, Contestant, zero_stage

ROOT = Path(__file__).resolve().parent.parent
THREADS = os.cpu_count() or 1
WARMUP_STEPS = 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["42m"])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CONTESTANTS,
        default=DEFAULT,
        metavar="NAME",
        help="contestants",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps per contestant and round")
    parser.add_argument("--batch", type=int, help="sequences per step; default: by shape")
    parser.add_argument(
        "--peers",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter with the other frameworks installed",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw tokens per second")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.precision = arguments.precision or ("bf16" if gpu() else "fp32")
    results = {}
    for shape in arguments.shape:
        results[shape] = result = measure(shape, arguments)
        sys.stdout.write(table(shape, result) + "\n")
        sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        arguments.plot.write_text(draw(results), encoding="utf-8")


def measure(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds of one shape. Return the results."""
    model, batch = SHAPES[shape]
    batch = arguments.batch or batch
    trials: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only}
    peaks, faults = list[float](), dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="train-") as temporary:
        folder = Path(temporary)
        make_data(folder / "data", model, samples=batch * (arguments.steps + 1))
        for number in range(arguments.rounds):
            for name in trials:
                if name in faults:
                    continue
                peaks.append(matmul_rate(arguments.precision))
                try:
                    row = run_trial(name, model, batch, arguments, folder / f"{name}-{number}")
                    trials[name].append(row)
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
            for name, rows in trials.items()
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
    """Return the FLOPs of a token's matrix products in forward and backward.

    Attention counts only the causal half, and the embedding counts nothing.
    """
    from megalite import plan
    from megalite.config import ModelConfig

    config = ModelConfig.model_validate(model)
    return plan.flops_per_token(config, model["max_position_embeddings"])


def matmul_rate(precision: str) -> float:
    """Return the FLOP/s of a large matrix product, the median over two seconds."""
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


def run_trial(
    name: str, model: dict[str, Any], batch: int, arguments: argparse.Namespace, path: Path
) -> dict[str, Any]:
    """Train as one contestant in a new process.

    Args:
        path: path without suffix for the run's log and run file. Its last part is the run's name.
    Returns:
        the seconds of each step after the warm-up, peak memory, and the seconds until the end of
        the first step.
    """
    contestant = CONTESTANTS[name]
    log = path.with_suffix(".log")
    if contestant.peer:
        shape = json.dumps(
            {
                "model": model,
                "batch": batch,
                "steps": arguments.steps,
                "precision": arguments.precision,
            }
        )
        script = str(Path(__file__).with_name("peers.py"))
        command = [arguments.peers, script, contestant.peer, shape]
    else:
        command = write_run(contestant, model, batch, arguments, path)
    environ = os.environ | {"OMP_NUM_THREADS": str(max(1, THREADS // contestant.ranks))}
    began = time.time()
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=environ, check=False)
    text = log.read_text(encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"ended with exit code {done.returncode}: {text[-500:]}")
    if contestant.peer:
        result = json.loads(text.strip().splitlines()[-1])
        ends, memory = result["ends"], result["memory"]
    else:
        lines = (path.parent / "runs" / path.name / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
        memory = max(row["peak_memory_bytes"] for row in rows)
        ends = [row["time"] for row in rows]
        if name in ("full", "bare"):  # mean step time after the first third, including saves
            third = arguments.steps // 3
            start = next(row["time"] for row in rows if row["step"] == third)
            seconds = [(ends[-1] - start) / (arguments.steps - third)]
            return {"seconds": seconds, "memory": memory, "first": float("nan")}
    seconds = [after - before for before, after in itertools.pairwise(ends)][WARMUP_STEPS - 1 :]
    return {"seconds": seconds, "memory": memory, "first": ends[0] - began}


def write_run(
    contestant: Contestant,
    model: dict[str, Any],
    batch: int,
    arguments: argparse.Namespace,
    path: Path,
) -> list[str]:
    """Write the run file of a MegaLite contestant and return its command."""
    steps, folder = arguments.steps, path.parent
    run: dict[str, Any] = {
        "name": path.name,
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
            "precision": arguments.precision,
            "compile": True,
            "log_every": 1,
        },
        "checkpoint": {"every": 0},
        "logging": {"directory": str(folder / "runs")},
    }
    for section, values in contestant.sections.items():
        run[section] = run.get(section, {}) | values
    run["training"]["log_every"] = run["training"]["log_every"] or max(1, steps // 3)
    if run["training"]["precision"] == "bf16" and run.get("deepspeed") == zero_stage(0):
        run["deepspeed"] = zero_stage(1)
    file = folder / f"{path.name}.json"
    file.write_text(json.dumps(run), encoding="utf-8")
    launch = [sys.executable]
    if contestant.ranks > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc-per-node={contestant.ranks}"]
    return [*launch, str(ROOT / "launcher" / "pretrain.py"), "--config", str(file)]


@cache
def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _tensor(contestant: Contestant) -> int:
    return int(contestant.sections.get("parallel", {}).get("tensor", 1))


def make_data(folder: Path, model: dict[str, Any], *, samples: int) -> None:
    """Write shards of random ids, with one window per document."""
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
        f"{shape}: {result['tokens_per_step']:,} tokens per step, matrix product "
        f"{machine / 1e9:.0f} GFLOP/s",
        f"{'':16} {'tokens/s':>9} {'of peak':>8} {'memory':>8} {'first step':>11} "
        f"{'megalite speed-up':>18}",
    ]
    megalite = result["contestants"].get("megalite")
    for name, row in result["contestants"].items():
        rate = row["tokens_per_second"]
        speed_up = f"{megalite['tokens_per_second'] / rate:.2f} x" if megalite else ""
        memory = f"{row['memory_bytes'] / 1e9:.2f} GB"
        seconds = row["first_step_seconds"]
        first_step = "" if math.isnan(seconds) else f"{seconds:.1f} s"
        lines.append(
            f"{name:16} {rate:9,.0f} {row['share_of_peak']:8.0%} {memory:>8} {first_step:>11} "
            f"{speed_up:>18}"
        )
    lines += [f"{name:16} failed: {reason[-200:]}" for name, reason in result["faults"].items()]
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> str:
    """Return an SVG with bars of tokens per second, grouped by shape."""
    parts, y = list[str](), 10
    for shape, result in results.items():
        parts.append(f'<text x="10" y="{y + 14}" font-weight="bold">{shape}</text>')
        y += 24
        rows = result["contestants"]
        highest = max(row["tokens_per_second"] for row in rows.values())
        for name, row in rows.items():
            rate = row["tokens_per_second"]
            colour = "#8899aa" if CONTESTANTS[name].peer else "#2266cc"
            parts.append(
                f'<text x="10" y="{y + 13}">{name}</text>'
                f'<rect x="130" y="{y}" width="{400 * rate / highest:.0f}" height="16" '
                f'fill="{colour}"/><text x="{140 + 400 * rate / highest:.0f}" y="{y + 13}">'
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
