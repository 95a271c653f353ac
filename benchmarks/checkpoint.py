"""What a checkpoint costs: saved while training waits, saved in the background, and loaded.

    python benchmarks/checkpoint.py                  58 M parameters, ZeRO-1, 1 and 2 ranks
    python benchmarks/checkpoint.py --ranks 2 --rounds 3

In every round, one after the other, with the ranks in step:

    limit   every rank writes its share of the bytes to a file, hashes and syncs it
    save    the whole save, while training waits: gathered, written, hashed, synced, published
    steps   some steps of training without a save
    stall   the same steps with a save in the background: what training waited for it (the snapshot
            and the publication); `slower` is by how much the steps in between took longer
    read    every rank reads its share of the bytes and hashes them
    load    the whole resume: every file checked, every state set, read back and compared
    guard   one comparison of replicas, as training makes every `training.replica_check_every` steps

A ratio is taken within a round; medians over the rounds are printed.
"""

from __future__ import annotations

import sys

sys.path.sort(key=lambda path: path.endswith("benchmarks"))  # last, for it has a tokenize.py

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import run_on_cpu

from megalite.env import Launch

STEPS, PIECE = 6, 1 << 22
MODEL = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
STALL = {1: 0.20, 2: 0.50}  # of a save, at most
DRIFT_EVERY = 100  # the default
RATE = 0.5  # of the limit, at least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: temporary)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    chosen = parser.parse_args()
    found = {}
    for ranks in chosen.ranks:
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=chosen.folder) as folder:
            every = run_on_cpu(measure, ranks, chosen.rounds, Path(folder))
        rounds = [
            {name: max(rows[number][name] for rows in every) for name in every[0][number]}
            for number in range(chosen.rounds)
        ]
        found[f"{ranks} ranks"] = summary = summarise(rounds)
        if not chosen.json:
            sys.stdout.write(table(ranks, summary) + "\n")
    if chosen.json:
        sys.stdout.write(json.dumps(found) + "\n")


def summarise(rounds: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    ratios = {
        "stall of save": [r["stall"] / r["save"] for r in rounds],
        "save of limit": [r["limit"] / r["save"] for r in rounds],
        "load of limit": [r["read"] / r["load"] for r in rounds],
        "guard of a step": [r["guard"] / DRIFT_EVERY * STEPS / r["steps"] for r in rounds],
    }
    return {
        "seconds": medians,
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "rounds": rounds,
    }


def table(ranks: int, found: dict[str, Any]) -> str:
    seconds = ", ".join(f"{n} {s:.2f}" for n, s in found["seconds"].items() if n != "bytes")
    ratios, size = found["ratios"], found["seconds"]["bytes"] / 1e6
    return "\n".join(
        (
            f"{ranks} rank{'s' * (ranks > 1)}, {size:,.0f} MB; seconds: {seconds}",
            f"  a background save stalls training by {ratios['stall of save']:.0%} of a save "
            f"(under {STALL.get(ranks, 0.5):.0%} is meant)",
            f"  save at {ratios['save of limit']:.0%} of the limit, load at "
            f"{ratios['load of limit']:.0%} (over {RATE:.0%} is meant)",
            f"  the guard costs {ratios['guard of a step']:.3%} of a step (under 0.5% is meant)",
        )
    )


def measure(launch: Launch, rounds: int, folder: Path) -> list[dict[str, float]]:
    """Measure every round as one rank and return its figures."""
    bench = Bench(launch, folder)
    rows = bench.rounds(rounds)
    bench.grid.barrier()
    return rows


class Bench:
    """A rank's engine and saver, and what is timed of them."""

    def __init__(self, launch: Launch, folder: Path) -> None:
        from megalite.checkpoint import Saver
        from megalite.config import RunConfig
        from megalite.engine.deepspeed import settings as deepspeed_settings
        from megalite.engine.deepspeed.engine import DeepSpeedEngine
        from megalite.parallel import start
        from megalite.plan import deepspeed_dict, make_plan
        from megalite.tokenizers.tokenizer import load_tokenizer
        from megalite.train.hooks.replicas import ReplicaCheck

        self.rank = rank = launch.rank
        self.ranks = ranks = launch.world_size
        self.config = config = RunConfig.model_validate(
            {
                "name": "checkpoint",
                "model": MODEL,
                "data": {"train": [{"path": "none"}], "sequence_length": 512},
                "optimizer": {"lr": 1e-4},
                "training": {"steps": 1, "global_batch_size": ranks, "micro_batch_size": 1},
            }
        )
        self.folder = folder
        plan = make_plan(config, world_size=ranks, device="cpu")
        self.grid = start(launch)
        settings = deepspeed_settings.fill_defaults(deepspeed_dict(config, plan), self.grid)
        self.engine = DeepSpeedEngine(
            config, grid=self.grid, precision=plan.precision, settings=settings
        )
        if rank == 0:
            (folder / "tokenizer").mkdir()
            load_tokenizer("bytes").save(folder / "tokenizer")
        self.grid.barrier()
        self.saver = Saver(
            self.engine,
            config,
            grid=self.grid,
            root=folder / "checkpoints",
            data_fingerprint="",
            tokenizer=folder / "tokenizer",
            tokenizer_sha256="",
            lease=None,
        )
        self.guard = ReplicaCheck(
            self.engine, config.model, self.grid, every=DRIFT_EVERY, stage=plan.zero_stage
        )
        self.batch = make_batch(rank)

    def rounds(self, count: int) -> list[dict[str, float]]:
        self.step()
        self.timed(self.save)
        files = (self.folder / "checkpoints").rglob("*.safetensors")
        size = sum(path.stat().st_size for path in files)
        share = os.urandom(PIECE) * (size // self.ranks // PIECE)
        path, rows = self.folder / f"limit-{self.rank}", []
        for _ in range(count):
            row = {"limit": self.timed(lambda: write(path, share)), "save": self.timed(self.save)}
            row |= {"read": self.timed(lambda: read(path)), "load": self.timed(self.load)}
            row["steps"], _ = self.training(background=False)
            whole, row["stall"] = self.training(background=True)
            row["guard"] = self.timed(lambda: self.guard.check(1))
            row["slower"] = whole - row["stall"] - row["steps"]
            rows.append(row | {"bytes": float(size)})
        return rows

    def timed(self, action: Callable[[], object]) -> float:
        self.grid.barrier()
        began = time.perf_counter()
        action()
        self.grid.barrier()
        return time.perf_counter() - began

    def step(self) -> None:
        self.engine.train_step([self.batch], divisor=512 * self.ranks, lr=1e-4, step=1)

    def save(self) -> None:
        self.begin(1, snapshot=False)
        self.saver.finish()

    def begin(self, step: int, *, snapshot: bool) -> None:
        from megalite.checkpoint import Progress

        self.saver.begin(Progress(step), snapshot=snapshot)

    def load(self) -> None:
        from megalite.checkpoint import find_newest, restore

        found, _ = find_newest(self.folder / "checkpoints", self.grid)
        assert found is not None
        folder, manifest = found
        restore(self.engine, self.config, grid=self.grid, folder=folder, manifest=manifest)

    def training(self, *, background: bool) -> tuple[float, float]:
        """Return seconds of some steps, and of waiting for a save in the midst of them."""
        waited, began = 0.0, time.perf_counter()
        if background:
            waited += self.timed(lambda: self.begin(2, snapshot=True))
        for number in range(STEPS):
            self.step()
            last = number == STEPS - 1
            if background and self.saver.under_way and (self.written() or last):
                waited += self.timed(self.saver.finish)
        return time.perf_counter() - began, waited

    def written(self) -> bool:
        """Make the small reduction of every training step."""
        import torch

        done = torch.tensor([self.saver.written])
        self.grid.all_reduce_cpu(done)
        return int(done) == self.saver.begun * self.ranks


def make_batch(seed: int) -> Any:
    import torch

    from megalite.data import Batch

    tokens = torch.randint(32000, (1, 513), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(1, 512, dtype=torch.bool)
    tensors = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}
    return Batch(tensors, 0, 512)


def write(path: Path, data: bytes) -> None:
    digest, view = hashlib.sha256(), memoryview(data)
    with open(path, "wb") as file:
        for at in range(0, len(view), PIECE):
            file.write(view[at : at + PIECE])
            digest.update(view[at : at + PIECE])
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> None:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)


if __name__ == "__main__":
    main()
