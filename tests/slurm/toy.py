"""A launcher without a model: it counts steps, saves, obeys signals, and crashes as planned.

Rank 0 writes the same files as rank 0 of a real run. Two files next to the run file change the run:

- `faults.json`: a list of {"attempt", "rank", "step"}; the rank crashes at this step.
- `endless`: the first attempt continues until a signal stops it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

config = Path(sys.argv[sys.argv.index("--config") + 1])
raw = json.loads(config.read_text())
STEPS, EVERY = raw["training"]["steps"], 10
run = Path(raw["logging"]["directory"]) / raw["name"]
faults = config.with_name("faults.json")
planned = json.loads(faults.read_text()) if faults.exists() else []
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
world = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
signals: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: signals.append(number))

attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
step = max((int(p.name[5:]) for p in run.glob("checkpoints/step_*")), default=0)


def write(state: str) -> None:
    if rank == 0:
        text = json.dumps({"state": state, "step": step, "attempt": attempt}, indent=2)
        (run / ".status").write_text(text)
        os.replace(run / ".status", run / "status.json")


crash = run / f"crashed_{attempt}"


def save() -> None:
    """Save a checkpoint, unless a rank has crashed, because a real save needs all ranks."""
    if rank == 0 and step and not crash.exists():
        (run / "checkpoints" / f"step_{step:08d}").mkdir(exist_ok=True)


def end(state: str, code: int) -> None:
    write(state)
    with open(run / f"ended_{attempt}_{rank}_of_{world}", "w") as file:
        file.write(state)
    os._exit(code)


endless = config.with_name("endless").exists() and attempt == 0
write("running")
while step < STEPS or endless:
    time.sleep(0.15)
    step += 1
    if {"attempt": attempt, "rank": rank, "step": step} in planned:
        crash.touch()
        os._exit(1)
    if step % EVERY == 0:
        save()
    if signals:
        save()
        end("stopped", 75)
end("done", 0)
