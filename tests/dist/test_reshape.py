"""Runs that are resumed twice under other layouts have the curve of an uninterrupted run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megalite.data import Loader
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, run_file, train, zero

# (tensor, ranks, stage)
Layout = tuple[int, int, int]
SAVED: list[Layout] = [(2, 4, 1), (2, 4, 2), (2, 4, 3), (1, 4, 3)]
SIZES: list[tuple[int, int]] = [(1, 1), (2, 2), (4, 4), (1, 2), (1, 4)]
QUICK: list[tuple[Layout, Layout]] = [
    ((2, 4, 1), (1, 1, 0)),
    ((2, 4, 3), (4, 4, 2)),
    ((1, 4, 3), (2, 2, 1)),
    ((2, 4, 2), (1, 2, 3)),
]
EVERY = [(saved, (t, n, stage)) for saved in SAVED for t, n in SIZES for stage in range(4)]
# four key/value heads, so that TP 4 is possible; a vocabulary that 2 and 4 do not divide
MODEL = {"num_key_value_heads": 4, "vocab_size": 301}


def layout(raw: dict[str, Any], where: Layout, **changes: Any) -> dict[str, Any]:
    tensor, _, stage = where
    return raw | {"parallel": {"tensor": tensor}, "deepspeed": zero(stage)} | changes


Samples = dict[int, list[int]]  # place in the data order: token ids


def train_seen(launch: Any, raw: dict[str, Any]) -> Samples:
    """Train, and return the samples of this rank."""
    seen: Samples = {}
    take = Loader.__next__

    def watched(loader: Loader) -> Any:
        step = take(loader)
        for batch in step.micro_batches:
            for row, ids in enumerate(batch.tensors["input_ids"].tolist()):
                seen[batch.place + row] = ids
        return step

    Loader.__next__ = watched  # type: ignore[method-assign]  # only in this rank's process
    train(launch, raw)
    return seen


def run_seen(raw: dict[str, Any], where: Layout) -> Samples:
    """Train under a layout, and return the samples of all ranks, equal within a tensor group."""
    together: Samples = {}
    for seen in run_ranks(train_seen, where[1], raw):
        assert all(together.setdefault(place, ids) == ids for place, ids in seen.items())
    return together


class Saved:
    """Runs of 20 steps, one per layout, each trained at its first use."""

    def __init__(self, shards: dict[str, str], root: Path) -> None:
        self.shards, self.root = shards, root
        self.seen: dict[Layout, Samples] = {}

    def run(self, where: Layout) -> dict[str, Any]:
        folder = self.root / "-".join(map(str, where))
        checkpoint = {"every": 5, "keep": 5}
        raw = run_file(self.shards, folder, model=MODEL, checkpoint=checkpoint)
        # the decay does not depend on training.steps, which differ between starts
        raw["schedule"] |= {"decay_steps": 11}
        raw = layout(raw, where)
        if where not in self.seen:
            self.seen[where] = run_seen(raw, where)
        return raw


@pytest.fixture(scope="module")
def saved(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(shards, tmp_path_factory.mktemp("saved"))


def resume_errors(saved: Saved, tmp_path: Path, source: Layout, target: Layout) -> list[str]:
    """Resume from step 10 under `target`, and from step 15 of that under `source`."""
    whole = saved.run(source)
    folder = tmp_path / "run"
    shutil.copytree(Path(whole["logging"]["directory"]) / "run", folder)
    here = whole["logging"] | {"directory": str(tmp_path)}
    errors = []
    for attempt, where, start in ((1, target, 10), (2, source, 15)):
        for step in (15, 20):
            if step > start:
                shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
        raw = layout(whole, where, logging=here)
        seen = run_seen(raw, where)
        steps = [row["step"] for row in rows(raw) if row["attempt"] == attempt]
        assert steps == list(range(start + 1, 21))
        places = range(8 * start, 8 * 20)
        errors += [
            f"sample {place}" for place in places if seen[place] != saved.seen[source][place]
        ]
        pairs = zip(curve(raw, start + 1), curve(whole, start + 1), strict=True)
        errors += [
            f"step {step} of attempt {attempt}: {pair}, expected {expected}"
            for step, (pair, expected) in enumerate(pairs, start + 1)
            if pair != pytest.approx(expected, rel=1e-5)
        ]
    return errors


@pytest.mark.parametrize(("source", "target"), QUICK)
def test_resume_on_another_layout_gives_the_same_curve(
    saved: Saved, tmp_path: Path, source: Layout, target: Layout
) -> None:
    assert resume_errors(saved, tmp_path, source, target) == []


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), EVERY)
def test_resume_on_every_layout_gives_the_same_curve(
    saved: Saved, tmp_path: Path, source: Layout, target: Layout
) -> None:
    assert resume_errors(saved, tmp_path, source, target) == []
