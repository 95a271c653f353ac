"""Measure the peak memory of building a model under ZeRO-3, on one rank and on two.

    python benchmarks/build.py                          the 1 B model of configs/1b.json, bf16
    python benchmarks/build.py --config configs/125m.json

Each rank is a new process. The engine that it builds has the model, initial weights, fp32 masters
and optimizer states. The figure is the process's peak resident memory minus its resident memory
before the build, when all modules are imported and the ranks are connected. Each parameter is
partitioned when it is created, and initialised one at a time. So each of two ranks should hold
about half.
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ranks import run_on_cpu

from megalite.env import Launch

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.65  # largest ratio of the peak of two ranks to that of one


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "1b.json"))
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"config": Path(arguments.config).name}
    for ranks in (1, 2):
        rows = run_on_cpu(build, ranks, arguments.config)
        result[f"{ranks} ranks"] = {
            "peak_bytes": max(row["peak"] for row in rows),
            "seconds": max(row["seconds"] for row in rows),
            "parameters": rows[0]["parameters"],
        }
    peaks = [result[f"{ranks} ranks"]["peak_bytes"] for ranks in (1, 2)]
    result["ratio"] = peaks[1] / peaks[0]
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for ranks, peak in zip((1, 2), peaks, strict=True):
        row = result[f"{ranks} ranks"]
        sys.stdout.write(
            f"{ranks} rank{'s' * (ranks > 1)}: {peak / 2**30:6.2f} GiB per rank for the build, "
            f"{row['seconds']:.1f} s, {row['parameters'] / 1e6:.0f} M parameters\n"
        )
    sys.stdout.write(f"ratio {result['ratio']:.3f} (target: under {TARGET})\n")


def build(launch: Launch, config_path: str) -> dict[str, Any]:
    """Build the engine as one rank. Return peak bytes, seconds, and the number of parameters."""
    from megalite.config import load_config
    from megalite.engine.deepspeed import settings as deepspeed_settings
    from megalite.engine.deepspeed.engine import DeepSpeedEngine
    from megalite.parallel import start
    from megalite.plan import deepspeed_dict, make_plan

    changes = ["training.precision=bf16", "deepspeed.zero_optimization.stage=3"]
    changes += ["parallel.tensor=1", "training.micro_batch_size=1"]
    changes += [f"training.global_batch_size={2 * launch.world_size}"]
    config = load_config(config_path, changes)
    plan = make_plan(config, world_size=launch.world_size, device="cpu")
    grid = start(launch)
    settings = deepspeed_settings.fill_defaults(deepspeed_dict(config, plan), grid)
    grid.barrier()
    before = memory_bytes("VmRSS")
    began = time.monotonic()
    engine = DeepSpeedEngine(config, grid=grid, precision=plan.precision, settings=settings)
    seconds = time.monotonic() - began
    assert engine.stage == 3
    peak = memory_bytes("VmHWM") - before
    grid.barrier()
    return {"peak": peak, "seconds": seconds, "parameters": plan.parameters}


def memory_bytes(key: str) -> int:
    """Return a value of this process's /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status does not exist; run this benchmark on Linux")


if __name__ == "__main__":
    main()
