"""What a rank holds while a model is built and initialised under ZeRO-3, on one rank and on two.

    python benchmarks/build.py                          the 1 B model of configs/1b.json, bf16
    python benchmarks/build.py --config configs/125m.json

Each rank is a fresh process. Its figure is the most that was resident while the engine was made
(model, initial weights, masters, optimizer states), less what was resident when everything was
imported and the ranks had met. A parameter is partitioned as it is created and written one at a
time, so two ranks should each hold about half.
"""

from __future__ import annotations

import sys

sys.path.sort(key=lambda path: path.endswith("benchmarks"))  # last, for it has a tokenize.py

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ranks import run_on_cpu

from megalite.env import Launch

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.65  # of one rank's


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "1b.json"))
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    chosen = parser.parse_args()
    found: dict[str, Any] = {"config": Path(chosen.config).name}
    for ranks in (1, 2):
        rows = run_on_cpu(build, ranks, chosen.config)
        found[f"{ranks} ranks"] = {
            "peak_bytes": max(row["peak"] for row in rows),
            "seconds": max(row["seconds"] for row in rows),
            "parameters": rows[0]["parameters"],
        }
    peaks = [found[f"{ranks} ranks"]["peak_bytes"] for ranks in (1, 2)]
    found["ratio"] = peaks[1] / peaks[0]
    if chosen.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for ranks, peak in zip((1, 2), peaks, strict=True):
        row = found[f"{ranks} ranks"]
        sys.stdout.write(
            f"{ranks} rank{'s' * (ranks > 1)}: {peak / 2**30:6.2f} GiB a rank above the imports, "
            f"{row['seconds']:.1f} s, {row['parameters'] / 1e6:.0f} M parameters\n"
        )
    sys.stdout.write(f"ratio {found['ratio']:.3f} (under {TARGET} is meant)\n")


def build(launch: Launch, config_path: str) -> dict[str, Any]:
    """Build the engine as one rank and return what it took."""
    from megalite.config import load_config
    from megalite.engine.deepspeed import settings as deepspeed_settings
    from megalite.engine.deepspeed.engine import DeepSpeedEngine
    from megalite.parallel import start
    from megalite.plan import deepspeed_dict, make_plan

    sets = ["training.precision=bf16", "deepspeed.zero_optimization.stage=3", "parallel.tensor=1"]
    sets += [f"training.global_batch_size={2 * launch.world_size}", "training.micro_batch_size=1"]
    config = load_config(config_path, sets)
    plan = make_plan(config, world_size=launch.world_size, device="cpu")
    grid = start(launch)
    settings = deepspeed_settings.fill_defaults(deepspeed_dict(config, plan), grid)
    grid.barrier()
    before, began = resident("VmRSS"), time.monotonic()
    engine = DeepSpeedEngine(config, grid=grid, precision=plan.precision, settings=settings)
    seconds = time.monotonic() - began
    assert engine.stage == 3
    peak = resident("VmHWM") - before
    grid.barrier()
    return {"peak": peak, "seconds": seconds, "parameters": plan.parameters}


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no /proc/self/status here: this benchmark needs Linux")


if __name__ == "__main__":
    main()
