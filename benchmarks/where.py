"""Print the share of a training step's time by kind of work, from a trace of `training.profile`.

    python launcher/pretrain.py --config my.json --set training.profile=[5,6]
    python benchmarks/where.py runs/my/profile/rank_00000.json.gz --plot where.svg

On a CPU, the time of an operation is its self time, without the operations that it calls. On a GPU,
it is the time of its kernels. The rest of the steps' time is Python and waiting.
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# An operation belongs to the first kind of which its name contains a word.
KINDS = {
    "attention": ("scaled_dot_product", "flash", "fmha"),
    "matrix products": ("aten::mm", "addmm", "bmm", "gemm", "cutlass", "linear", "nvjet"),
    "compiled passes": ("CompiledFx", "CompiledFunction", "graph_", "triton"),
    "optimizer, clipping": ("_fused_adam", "vector_norm", "zero_grad", "Optimizer"),
    "communication": ("gloo", "nccl", "c10d", "all_reduce", "allreduce", "reduce_scatter"),
    "other operations": ("",),
}
COLOURS = ("#2266cc", "#66aadd", "#ddaa33", "#cc5544", "#55aa77", "#999999", "#dddddd")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    arguments = parser.parse_args()
    with gzip.open(arguments.trace, "rt", encoding="utf-8") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    shares = time_shares(events)
    sys.stdout.write("".join(f"{kind:22} {share:6.1%}\n" for kind, share in shares.items()))
    if arguments.plot:
        arguments.plot.write_text(draw(shares), encoding="utf-8")


def time_shares(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return each kind's share of the time from the first operation to the last."""
    kernels = [e for e in events if e.get("cat") == "kernel"]
    operations = kernels or [e for e in events if e.get("cat") in ("cpu_op", "user_annotation")]
    times: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for event, self_time in self_times(operations):
        name = event["name"]
        kind = next(k for k, words in KINDS.items() if any(word in name for word in words))
        times[kind] += self_time
    total = max(e["ts"] + e["dur"] for e in operations) - min(e["ts"] for e in operations)
    rest = max(0.0, total - sum(times.values()))
    return {k: v / total for k, v in times.items() if v} | {"Python and waiting": rest / total}


def self_times(events: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], float]]:
    """Yield each event and its duration, minus the durations of its direct children.

    A child is an event of the same thread that lies within the event.
    """
    threads = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for rows in threads.values():
        rows.sort(key=lambda e: (e["ts"], -e["dur"]))
        children: dict[int, float] = defaultdict(float)
        stack: list[int] = []
        for number, event in enumerate(rows):
            while stack and rows[stack[-1]]["ts"] + rows[stack[-1]]["dur"] <= event["ts"]:
                stack.pop()
            if stack:
                children[stack[-1]] += event["dur"]
            stack.append(number)
        for number, event in enumerate(rows):
            yield event, max(0.0, event["dur"] - children[number])


def draw(shares: dict[str, float]) -> str:
    """Return an SVG with one bar of all shares, and a legend."""
    parts, x = list[str](), 10.0
    for number, (kind, share) in enumerate(shares.items()):
        colour, y = COLOURS[number % len(COLOURS)], 60 + 20 * number
        parts.append(
            f'<rect x="{x:.1f}" y="10" width="{700 * share:.1f}" height="30" fill="{colour}"/>'
            f'<rect x="10" y="{y}" width="14" height="14" fill="{colour}"/>'
            f'<text x="32" y="{y + 12}">{kind}: {share:.1%}</text>'
        )
        x += 700 * share
    height = 70 + 20 * len(shares)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" '
        'font-family="sans-serif" font-size="13">\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
