"""Where a step's time goes: a trace made by `training.profile`, summed by kind of work.

    python launcher/pretrain.py --config my.json --set training.profile=[5,6]
    python benchmarks/where.py runs/my/profile/rank_00000.json.gz --plot where.svg

Each operation counts with the time it spent itself, on the thread that ran it, without what it
called; on a GPU it is the kernels' time. What is left of the steps is Python and waiting.
"""

from __future__ import annotations

import sys

sys.path.sort(key=lambda path: path.endswith("benchmarks"))  # last, for it has a tokenize.py

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# the first that fits
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
    chosen = parser.parse_args()
    with gzip.open(chosen.trace, "rt", encoding="utf-8") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    shares = summed(events)
    sys.stdout.write("".join(f"{kind:22} {share:6.1%}\n" for kind, share in shares.items()))
    if chosen.plot:
        chosen.plot.write_text(drawing(shares), encoding="utf-8")


def summed(events: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the time from the first operation to the last."""
    kernels = [e for e in events if e.get("cat") == "kernel"]
    work = kernels or [e for e in events if e.get("cat") in ("cpu_op", "user_annotation")]
    found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for event, own in own_times(work):
        name = event["name"]
        kind = next(k for k, words in KINDS.items() if any(word in name for word in words))
        found[kind] += own
    whole = max(e["ts"] + e["dur"] for e in work) - min(e["ts"] for e in work)
    rest = max(0.0, whole - sum(found.values()))
    return {k: v / whole for k, v in found.items() if v} | {"Python and waiting": rest / whole}


def own_times(events: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], float]]:
    """Yield each event's duration less those of the events within it on its thread."""
    threads = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for rows in threads.values():
        rows.sort(key=lambda e: (e["ts"], -e["dur"]))
        inside: dict[int, float] = defaultdict(float)
        stack: list[int] = []
        for number, event in enumerate(rows):
            while stack and rows[stack[-1]]["ts"] + rows[stack[-1]]["dur"] <= event["ts"]:
                stack.pop()
            if stack:
                inside[stack[-1]] += event["dur"]
            stack.append(number)
        for number, event in enumerate(rows):
            yield event, max(0.0, event["dur"] - inside[number])


def drawing(shares: dict[str, float]) -> str:
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
