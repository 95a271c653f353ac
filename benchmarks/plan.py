"""How true the plan's forecasts are: against published runs, and against runs on this machine.

    python benchmarks/plan.py                       published throughput and layouts (seconds)
    python benchmarks/plan.py --cpu                 24 small runs and 8 of the kinds that users
                                                    start, here: memory, and steps of the 24 after
                                                    calibration on two of them (40 minutes)
    python benchmarks/plan.py --kinds               those 8 alone
    python benchmarks/plan.py --fit 120             search for better efficiencies, for so long

benchmarks/published.json has each published row with its source: layers, width, heads, key/value
heads, inner width, vocabulary, gated, tied; the layout; and tokens/s a GPU. Sharding counts as the
ZeRO stage that moves the same. Model FLOPs utilisation is compared in one convention (all of
attention, the head once), so its error is that of tokens/s. The peer is the best constant: one
utilisation guessed for every row.
"""

from __future__ import annotations

import sys

sys.path.sort(key=lambda path: path.endswith("benchmarks"))  # last, for it has a tokenize.py

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import plan_runs

from megalite.config import RunConfig, parse_config
from megalite.errors import ConfigError
from megalite.plan import Plan, make_plan
from megalite.plan.devices import DEVICES, Device, Efficiencies, make_device
from megalite.plan.flops import window_flops
from megalite.plan.seconds import Cluster, step_seconds

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab", "gated", "tied")
# torchtitan's: 96 GB of HBM2e at 500 W of 700; what a product reaches follows the power's root
SLOW_H100 = dataclasses.replace(
    DEVICES["h100"], memory=96 << 30, bandwidth=2.4e12, reached=0.801 * (500 / 700) ** 0.5
)
GPUS = {"h100-80gb": DEVICES["h100"], "h100-96gb-hbm2e-500w": SLOW_H100}
APART = 0.03  # of tokens/s: what is nearer is no pair to be put into an order


@dataclasses.dataclass(frozen=True)
class Row:
    """A published run as a run file of ours, on its devices."""

    told: dict[str, Any]
    config: RunConfig
    plan: Plan
    device: Device
    utilisation_per_rate: float  # utilisation of one token/s a GPU

    @property
    def published(self) -> float:
        return float(self.told["tokens_per_second_per_gpu"]) * self.utilisation_per_rate

    def forecast(self, efficiencies: Efficiencies | None = None) -> float:
        device = self.device
        if efficiencies is not None:
            device = dataclasses.replace(device, efficiencies=efficiencies)
        gpus, near = self.told["gpus"], self.told["per_host"]
        seconds = step_seconds(self.config, self.plan, Cluster(device, max(1, gpus // near), near))
        rate = self.plan.tokens_per_step / gpus / seconds.total
        return rate * self.utilisation_per_rate


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="runs on this machine")
    parser.add_argument("--kinds", nargs="*", metavar="NAME", help="these kinds alone; all")
    parser.add_argument("--fit", type=float, metavar="SECONDS", help="search for efficiencies")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


# ---- published


def published() -> Iterator[Row]:
    raw = json.loads((ROOT / "benchmarks" / "published.json").read_text(encoding="utf-8"))
    for told in raw["rows"]:
        shape = dict(zip(NAMES, told["model"], strict=True))
        length, ranks = told["sequence_length"], told["gpus"] // told["tensor"]
        run = {
            "name": "published",
            "model": {
                "vocab_size": shape["vocab"],
                "hidden_size": shape["hidden"],
                "intermediate_size": shape["intermediate"],
                "num_hidden_layers": shape["layers"],
                "num_attention_heads": shape["heads"],
                "num_key_value_heads": shape["kv_heads"],
                "max_position_embeddings": length,
                "activation": "swiglu" if shape["gated"] else "gelu",
                "tie_word_embeddings": shape["tied"],
            },
            "data": {"train": [{"path": "-"}], "sequence_length": length},
            "optimizer": {"lr": 1e-3},
            "parallel": {"tensor": told["tensor"], "sequence": told["sequence"]},
            "training": {
                "steps": 1,
                "global_batch_size": told["micro_batch"] * told["accumulation"] * ranks,
                "micro_batch_size": told["micro_batch"],
                "activation_checkpointing": told["recompute"],
                "compile": told["compile"],
            },
            "deepspeed": {"zero_optimization": {"stage": told["zero"], "overlap_comm": True}},
        }
        try:
            config = parse_config(run)
            plan = make_plan(config, world_size=told["gpus"], device="cuda")
        except ConfigError as error:
            sys.stdout.write(f"omitted: {told['row']}: {error}\n")
            continue
        device = GPUS.get(told["gpu"]) or DEVICES[told["gpu"]]
        forward, _ = window_flops(config.model, length)
        flops = 3 * (forward.blocks + forward.head) / length
        flops += 12 * shape["layers"] * shape["hidden"] * length
        assert device.bf16 is not None
        yield Row(told, config, plan, device, flops / device.bf16)


def median_error(rows: Sequence[Row], efficiencies: Efficiencies | None = None) -> float:
    return statistics.median(abs(row.forecast(efficiencies) - row.published) for row in rows)


def best_constant(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the median error of the best single guess, and the guess."""
    found = [row.published for row in rows]
    guesses = (number / 1000 for number in range(1, 1000))
    return min((statistics.median(abs(x - guess) for x in found), guess) for guess in guesses)


def ordered_pairs(rows: Sequence[Row]) -> tuple[int, int]:
    """Of pairs of layouts of one model on as many equal GPUs: how many are in their order."""
    right = count = 0
    for one, other in itertools.combinations(rows, 2):
        same = ("table", "model", "gpu", "gpus", "sequence_length")
        if any(one.told[key] != other.told[key] for key in same):
            continue
        gap = one.published - other.published
        if abs(gap) > APART * max(one.published, other.published):
            count += 1
            right += (one.forecast() - other.forecast()) * gap > 0
    return right, count


def states_errors(rows: Sequence[Row]) -> list[float]:
    """Of weights, gradients and optimizer states, against what nanotron says it has allocated."""
    found = []
    for row in rows:
        if (told := row.told["memory_allocated_gib"]) is not None:
            parts = row.plan.memory_bytes
            held = sum(parts[name] for name in ("parameters", "gradients", "optimizer"))
            found.append(held / 2**30 / told - 1)
    return found


def compare_published(rows: Sequence[Row]) -> dict[str, Any]:
    error, (constant, guess) = median_error(rows), best_constant(rows)
    right, pairs = ordered_pairs(rows)
    tables: dict[str, list[float]] = {}
    for row in rows:
        tables.setdefault(row.told["table"], []).append(row.forecast() - row.published)
    by_table = {
        name: {"rows": len(gaps), "median_error": statistics.median(map(abs, gaps))}
        for name, gaps in tables.items()
    }
    states = states_errors(rows)
    return {
        "rows": len(rows),
        "median_error": error,
        "constant": guess,
        "constant_median_error": constant,
        "pairs": pairs,
        "pairs_in_order": right,
        "states_rows": len(states),
        "states_median_error": statistics.median(map(abs, states)),
        "tables": by_table,
    }


def fit(rows: Sequence[Row], seconds: float) -> Efficiencies:
    """Random steps from the present efficiencies; those that lower the median and mean error."""
    draw, names = random.Random(0), [field.name for field in dataclasses.fields(Efficiencies)]

    def cost(efficiencies: Efficiencies) -> float:
        errors = sorted(abs(row.forecast(efficiencies) - row.published) for row in rows)
        return errors[len(errors) // 2] + 0.5 * statistics.mean(errors)

    best = Efficiencies()
    lowest, end = cost(best), time.monotonic() + seconds
    while time.monotonic() < end:
        values = dataclasses.asdict(best)
        for name in draw.sample(names, draw.choice((1, 2, 3))):
            values[name] *= 2 ** draw.gauss(0, 0.25)
        shares = [name for name in names if name not in ("launch", "latency")]
        tried = Efficiencies(**values | {name: min(values[name], 1.0) for name in shares})
        if (found := cost(tried)) < lowest:
            best, lowest = tried, found
    return best


# ---- this machine

CALIBRATED_BY = (("20M", "1 rank"), ("20M", "tensor 2"))


def machine_runs(work: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run everything of benchmarks/plan_runs.py; return shapes on layouts, and kinds."""
    plan_runs.write_data(work)
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for rows, runs in zip(
        found, (plan_runs.shape_runs(work), plan_runs.kind_runs(work)), strict=True
    ):
        for row in runs:
            rows.append(row)
            sys.stdout.write(f"{json.dumps(row)}\n")
            sys.stdout.flush()
    return found


def memory_error(row: dict[str, Any]) -> tuple[float, bool]:
    """Return the relative error of predicted memory, and whether it is over 12 % and 100 MB."""
    predicted, measured = (row[key]["memory_bytes"] for key in ("predicted", "measured"))
    gap = predicted - measured
    return gap / measured, abs(gap) > max(0.12 * measured, 100e6)


def compare_kinds(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        row["kind"]: {
            "predicted_bytes": row["predicted"]["memory_bytes"],
            "measured_bytes": row["measured"]["memory_bytes"],
            "error": memory_error(row)[0],
            "beyond": memory_error(row)[1],
        }
        for row in found
    }


def compare_machine(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Memory as predicted; steps after a calibration on two of the runs."""
    from megalite.plan.calibrate import calibrate, read_run

    by_name = {(one["shape"], one["layout"]): one for one in found}
    told = calibrate([Path(by_name[key]["folder"]) for key in CALIBRATED_BY])
    device = make_device(told)
    memory, beyond, steps = [], [], []
    for one in found:
        measured = one["measured"]
        error, over = memory_error(one)
        memory.append(abs(error))
        beyond += [f"{one['shape']} {one['layout']}"] * over
        seconds = read_run(Path(one["folder"])).predicted(device)
        steps.append(abs(seconds / measured["step_seconds"] - 1))
    large = [m for m, one in zip(memory, found, strict=True) if one["shape"] in ("60M", "200M")]
    return {
        "runs": len(found),
        "memory_beyond": beyond,
        "memory_median_error_large": statistics.median(large),
        "step_median_error": statistics.median(steps),
        "step_worst_error": max(steps),
        "device": told,
    }


def main() -> None:
    chosen = parse()
    if chosen.kinds is not None:
        with tempfile.TemporaryDirectory(prefix="plan-") as work:
            plan_runs.write_data(Path(work))
            runs = plan_runs.kind_runs(Path(work), chosen.kinds)
            sys.stdout.write(json.dumps(compare_kinds(list(runs)), indent=2) + "\n")
        return
    rows = list(published())
    if chosen.fit:
        best = fit(rows, chosen.fit)
        sys.stdout.write(f"{best}: {median_error(rows, best):.4f}\n")
        return
    result = {"published": compare_published(rows)}
    if chosen.cpu:
        with tempfile.TemporaryDirectory(prefix="plan-") as work:
            shapes, kinds = machine_runs(Path(work))
            result["kinds"] = compare_kinds(kinds)
            result["machine"] = compare_machine(shapes)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
