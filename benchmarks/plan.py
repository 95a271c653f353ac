"""Compare the planner's forecasts with published runs, and with runs on this machine.

    python benchmarks/plan.py               published throughput and layouts; takes seconds
    python benchmarks/plan.py --cpu         also train 24 small runs and 8 typical runs here;
                                            takes 40 minutes
    python benchmarks/plan.py --kinds       train only the 8 typical runs
    python benchmarks/plan.py --fit 120     search for better efficiencies, for 120 seconds

For runs on this machine, predicted memory is compared with measured memory. For the 24 small runs,
step times are also compared, after a calibration on two of them.

benchmarks/published.json contains the published runs with their sources: shape of the model, layout
and tokens/s per GPU. A sharding of another framework is planned as the ZeRO stage that communicates
equally much. All rows use one convention for model FLOPs utilisation (MFU): full attention without
a causal discount, and the head counted once. So the errors of MFU and of tokens/s are the same. The
baseline is the best constant, which is one MFU for every row.
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

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
# entries of `model` in a row of published.json
NAMES = ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab", "gated", "tied")
# torchtitan's H100 has 96 GB of HBM2e and 500 W instead of 700 W. The rate of matrix products is
# assumed to be proportional to the square root of the power.
SLOW_H100 = dataclasses.replace(
    DEVICES["h100"], memory=96 << 30, bandwidth=2.4e12, reached=0.801 * (500 / 700) ** 0.5
)
GPUS = {"h100-80gb": DEVICES["h100"], "h100-96gb-hbm2e-500w": SLOW_H100}
MIN_GAP = 0.03  # relative difference in tokens/s; closer pairs of layouts are not ranked


@dataclasses.dataclass(frozen=True)
class Row:
    """A published run with its run file, plan and device.

    Attributes:
        entry: the row of published.json.
        mfu_per_rate: the MFU that corresponds to one token/s per GPU.
    """

    entry: dict[str, Any]
    config: RunConfig
    plan: Plan
    device: Device
    mfu_per_rate: float

    @property
    def published(self) -> float:
        """Return the published MFU."""
        return float(self.entry["tokens_per_second_per_gpu"]) * self.mfu_per_rate

    def forecast(self, efficiencies: Efficiencies | None = None) -> float:
        """Return the predicted MFU. None means the device's default efficiencies."""
        device = self.device
        if efficiencies is not None:
            device = dataclasses.replace(device, efficiencies=efficiencies)
        gpus, per_host = self.entry["gpus"], self.entry["per_host"]
        cluster = Cluster(device, max(1, gpus // per_host), per_host)
        seconds = step_seconds(self.config, self.plan, cluster)
        rate = self.plan.tokens_per_step / gpus / seconds.total
        return rate * self.mfu_per_rate


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="also train on this machine")
    parser.add_argument(
        "--kinds",
        nargs="*",
        metavar="NAME",
        help="train only these typical runs; no name: all of them",
    )
    parser.add_argument("--fit", type=float, metavar="SECONDS", help="search for efficiencies")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    return parser.parse_args()


# ---- published runs


def read_published() -> Iterator[Row]:
    """Yield the rows of published.json. Report the rows that have no valid run file."""
    raw = json.loads((ROOT / "benchmarks" / "published.json").read_text(encoding="utf-8"))
    for entry in raw["rows"]:
        shape = dict(zip(NAMES, entry["model"], strict=True))
        length, ranks = entry["sequence_length"], entry["gpus"] // entry["tensor"]
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
            "parallel": {"tensor": entry["tensor"], "sequence": entry["sequence"]},
            "training": {
                "steps": 1,
                "global_batch_size": entry["micro_batch"] * entry["accumulation"] * ranks,
                "micro_batch_size": entry["micro_batch"],
                "activation_checkpointing": entry["recompute"],
                "compile": entry["compile"],
            },
            "deepspeed": {"zero_optimization": {"stage": entry["zero"], "overlap_comm": True}},
        }
        try:
            config = parse_config(run)
            plan = make_plan(config, world_size=entry["gpus"], device="cuda")
        except ConfigError as error:
            sys.stdout.write(f"omitted: {entry['row']}: {error}\n")
            continue
        device = GPUS.get(entry["gpu"]) or DEVICES[entry["gpu"]]
        forward, _ = window_flops(config.model, length)
        flops = 3 * (forward.blocks + forward.head) / length
        flops += 12 * shape["layers"] * shape["hidden"] * length
        assert device.bf16 is not None
        yield Row(entry, config, plan, device, flops / device.bf16)


def median_error(rows: Sequence[Row], efficiencies: Efficiencies | None = None) -> float:
    return statistics.median(abs(row.forecast(efficiencies) - row.published) for row in rows)


def best_constant(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the median error of the best constant MFU, and the constant."""
    published = [row.published for row in rows]
    guesses = (number / 1000 for number in range(1, 1000))
    return min((statistics.median(abs(x - guess) for x in published), guess) for guess in guesses)


def ranked_pairs(rows: Sequence[Row]) -> tuple[int, int]:
    """Compare pairs of layouts of one model on equally many GPUs of one kind.

    Returns:
        the number of pairs that the forecast ranks correctly, and the number of pairs.
    """
    correct = count = 0
    for first, second in itertools.combinations(rows, 2):
        common = ("table", "model", "gpu", "gpus", "sequence_length")
        if any(first.entry[key] != second.entry[key] for key in common):
            continue
        gap = first.published - second.published
        if abs(gap) > MIN_GAP * max(first.published, second.published):
            count += 1
            correct += (first.forecast() - second.forecast()) * gap > 0
    return correct, count


def states_errors(rows: Sequence[Row]) -> list[float]:
    """Return the relative errors of predicted weights, gradients and optimizer states.

    The published value is the memory that nanotron reports as allocated.
    """
    errors = []
    for row in rows:
        if (allocated_gib := row.entry["memory_allocated_gib"]) is not None:
            parts = row.plan.memory_bytes
            predicted = sum(parts[name] for name in ("parameters", "gradients", "optimizer"))
            errors.append(predicted / 2**30 / allocated_gib - 1)
    return errors


def compare_published(rows: Sequence[Row]) -> dict[str, Any]:
    error, (constant, guess) = median_error(rows), best_constant(rows)
    correct, pairs = ranked_pairs(rows)
    tables: dict[str, list[float]] = {}
    for row in rows:
        tables.setdefault(row.entry["table"], []).append(row.forecast() - row.published)
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
        "pairs_in_order": correct,
        "states_rows": len(states),
        "states_median_error": statistics.median(map(abs, states)),
        "tables": by_table,
    }


def fit(rows: Sequence[Row], seconds: float) -> Efficiencies:
    """Search for efficiencies by random steps. Keep a step if it lowers the cost.

    The cost is the median error plus half the mean error.
    """
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
        if (tried_cost := cost(tried)) < lowest:
            best, lowest = tried, tried_cost
    return best


# ---- runs on this machine

# shape and layout of the runs that the machine is calibrated on
CALIBRATED_BY = (("20M", "1 rank"), ("20M", "tensor 2"))


def machine_runs(work: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run everything of benchmarks/plan_runs.py. Return the small runs, and the typical runs."""
    plan_runs.write_data(work)
    results: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for rows, runs in zip(
        results, (plan_runs.shape_runs(work), plan_runs.kind_runs(work)), strict=True
    ):
        for row in runs:
            rows.append(row)
            sys.stdout.write(f"{json.dumps(row)}\n")
            sys.stdout.flush()
    return results


def memory_error(row: dict[str, Any]) -> tuple[float, bool]:
    """Return the relative error of predicted memory, and whether it exceeds 12 % and 100 MB."""
    predicted, measured = (row[key]["memory_bytes"] for key in ("predicted", "measured"))
    gap = predicted - measured
    return gap / measured, abs(gap) > max(0.12 * measured, 100e6)


def compare_kinds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return predicted and measured memory by the name of the typical run."""
    return {
        row["kind"]: {
            "predicted_bytes": row["predicted"]["memory_bytes"],
            "measured_bytes": row["measured"]["memory_bytes"],
            "error": memory_error(row)[0],
            "beyond": memory_error(row)[1],
        }
        for row in rows
    }


def compare_machine(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the errors of memory, and of step times after a calibration on two of the runs."""
    from megalite.plan.calibrate import calibrate, read_run

    by_name = {(row["shape"], row["layout"]): row for row in rows}
    calibrated = calibrate([Path(by_name[key]["folder"]) for key in CALIBRATED_BY])
    device = make_device(calibrated)
    memory, beyond, steps = [], [], []
    for row in rows:
        measured = row["measured"]
        error, exceeds = memory_error(row)
        memory.append(abs(error))
        beyond += [f"{row['shape']} {row['layout']}"] * exceeds
        seconds = read_run(Path(row["folder"])).predicted(device)
        steps.append(abs(seconds / measured["step_seconds"] - 1))
    large = [m for m, row in zip(memory, rows, strict=True) if row["shape"] in ("60M", "200M")]
    return {
        "runs": len(rows),
        "memory_beyond": beyond,
        "memory_median_error_large": statistics.median(large),
        "step_median_error": statistics.median(steps),
        "step_worst_error": max(steps),
        "device": calibrated,
    }


def main() -> None:
    arguments = parse()
    if arguments.kinds is not None:
        with tempfile.TemporaryDirectory(prefix="plan-") as work:
            plan_runs.write_data(Path(work))
            runs = plan_runs.kind_runs(Path(work), arguments.kinds)
            sys.stdout.write(json.dumps(compare_kinds(list(runs)), indent=2) + "\n")
        return
    rows = list(read_published())
    if arguments.fit:
        best = fit(rows, arguments.fit)
        sys.stdout.write(f"{best}: {median_error(rows, best):.4f}\n")
        return
    result = {"published": compare_published(rows)}
    if arguments.cpu:
        with tempfile.TemporaryDirectory(prefix="plan-") as work:
            shapes, kinds = machine_runs(Path(work))
            result["kinds"] = compare_kinds(kinds)
            result["machine"] = compare_machine(shapes)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
