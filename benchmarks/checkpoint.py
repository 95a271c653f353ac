"""Measure blocking saves, background saves and loads of checkpoints, and the replica check.

    python benchmarks/checkpoint.py                  58 M parameters, ZeRO-1, 1 and 2 ranks
    python benchmarks/checkpoint.py --ranks 2 --rounds 3

Every round times the following, one after another. The ranks begin each item together.

    limit   each rank writes its share of a checkpoint's bytes to a file, hashes it and syncs it
    save    a blocking save: gather, write, hash, sync and publish
    steps   training steps without a save
    stall   in the same number of steps, the time that training waits for a background save (its
            snapshot and its publication)
    slower  the time by which the save slows these steps down, without `stall`
    read    each rank reads its share of the bytes and hashes it
    load    a resume: check every file, set every state, read it back and compare
    guard   one comparison of replicas, as a run makes every `training.replica_check_every` steps

Ratios are computed within a round. The output has medians over the rounds.
"""

from __future__ import annotations

import sys

# This folder goes last: its tokenize.py would hide the module of the standard library.
sys.path.sort(key=lambda path: path.endswith("benchmarks"))

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

STEPS = 6
PIECE = 1 << 22  # bytes written or read at a time
MODEL = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
MAX_STALL = {1: 0.20, 2: 0.50}  # by number of ranks; as a share of a blocking save
REPLICA_CHECK_EVERY = 100  # the default of training.replica_check_every
MIN_RATE = 0.5  # of a save or load, as a share of the limit's rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder to write to; default: temporary")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    results = {}
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=arguments.folder) as folder:
            by_rank = run_on_cpu(measure, ranks, arguments.rounds, Path(folder))
        rounds = [
            {name: max(rows[number][name] for rows in by_rank) for name in by_rank[0][number]}
            for number in range(arguments.rounds)
        ]
        results[f"{ranks} ranks"] = summary = summarise(rounds)
        if not arguments.json:
            sys.stdout.write(table(ranks, summary) + "\n")
    if arguments.json:
        sys.stdout.write(json.dumps(results) + "\n")


def summarise(rounds: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    ratios = {
        "stall of save": [r["stall"] / r["save"] for r in rounds],
        "save of limit": [r["limit"] / r["save"] for r in rounds],
        "load of limit": [r["read"] / r["load"] for r in rounds],
        "guard of a step": [r["guard"] / REPLICA_CHECK_EVERY * STEPS / r["steps"] for r in rounds],
    }
    return {
        "seconds": medians,
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "rounds": rounds,
    }


def table(ranks: int, summary: dict[str, Any]) -> str:
    seconds = ", ".join(f"{n} {s:.2f}" for n, s in summary["seconds"].items() if n != "bytes")
    ratios, megabytes = summary["ratios"], summary["seconds"]["bytes"] / 1e6
    return "\n".join(
        (
            f"{ranks} rank{'s' * (ranks > 1)}, {megabytes:,.0f} MB; seconds: {seconds}",
            f"  a background save makes training wait {ratios['stall of save']:.0%} of a blocking "
            f"save's time (target: under {MAX_STALL.get(ranks, 0.5):.0%})",
            f"  rate of a save: {ratios['save of limit']:.0%} of the limit, of a load: "
            f"{ratios['load of limit']:.0%} (target: over {MIN_RATE:.0%})",
            f"  replica checks cost {ratios['guard of a step']:.3%} of the training time "
            "(target: under 0.5%)",
        )
    )


def measure(launch: Launch, rounds: int, folder: Path) -> list[dict[str, float]]:
    """Measure as one rank. Return seconds by name for each round."""
    benchmark = Benchmark(launch, folder)
    rows = benchmark.run_rounds(rounds)
    benchmark.grid.barrier()
    return rows


class Benchmark:
    """One rank's engine, saver and replica check, with a timer around their methods."""

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
        self.replica_check = ReplicaCheck(
            self.engine, config.model, self.grid, every=REPLICA_CHECK_EVERY, stage=plan.zero_stage
        )
        self.batch = make_batch(rank)

    def run_rounds(self, count: int) -> list[dict[str, float]]:
        self.step()
        self.seconds_of(self.save)
        files = (self.folder / "checkpoints").rglob("*.safetensors")
        size = sum(path.stat().st_size for path in files)
        share = os.urandom(PIECE) * (size // self.ranks // PIECE)
        path, rows = self.folder / f"limit-{self.rank}", []
        for _ in range(count):
            row = {
                "limit": self.seconds_of(lambda: write(path, share)),
                "save": self.seconds_of(self.save),
            }
            row |= {"read": self.seconds_of(lambda: read(path)), "load": self.seconds_of(self.load)}
            row["steps"], _ = self.train(background=False)
            total, row["stall"] = self.train(background=True)
            row["guard"] = self.seconds_of(lambda: self.replica_check.check(1))
            row["slower"] = total - row["stall"] - row["steps"]
            rows.append(row | {"bytes": float(size)})
        return rows

    def seconds_of(self, action: Callable[[], object]) -> float:
        """Return the seconds from the common start to the end of the slowest rank."""
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

        newest, _ = find_newest(self.folder / "checkpoints", self.grid)
        assert newest is not None
        folder, manifest = newest
        restore(self.engine, self.config, grid=self.grid, folder=folder, manifest=manifest)

    def train(self, *, background: bool) -> tuple[float, float]:
        """Train `STEPS` steps.

        Args:
            background: whether to save a checkpoint in the background during the steps.
        Returns:
            seconds of all steps, and those of them that training waited for the save.
        """
        waited, began = 0.0, time.perf_counter()
        if background:
            waited += self.seconds_of(lambda: self.begin(2, snapshot=True))
        for number in range(STEPS):
            self.step()
            last = number == STEPS - 1
            if background and self.saver.under_way and (self.is_written() or last):
                waited += self.seconds_of(self.saver.finish)
        return time.perf_counter() - began, waited

    def is_written(self) -> bool:
        """Return whether all ranks have written their files.

        As in training, the ranks find this out by one small reduction per step.
        """
        import torch

        written = torch.tensor([self.saver.written])
        self.grid.all_reduce_cpu(written)
        return int(written) == self.saver.begun * self.ranks


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
