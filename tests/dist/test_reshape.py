"""Saved under one layout, resumed under any other, twice in a row: the curve of no interruption."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import curve, rows, run_file, train, zero

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


class Saved:
    """Runs of 20 steps, one a layout, made when first asked for."""

    def __init__(self, shards: dict[str, str], root: Path) -> None:
        self.shards, self.root = shards, root

    def run(self, where: Layout) -> dict[str, Any]:
        folder = self.root / "-".join(map(str, where))
        checkpoint = {"every": 5, "keep": 5}
        raw = run_file(self.shards, folder, model=MODEL, checkpoint=checkpoint)
        # a decay of its own length: the curve does not depend on where the run is cut
        raw["schedule"] |= {"decay_steps": 11}
        raw = layout(raw, where)
        if not folder.exists():
            run_ranks(train, where[1], raw)
        return raw


@pytest.fixture(scope="module")
def saved(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(shards, tmp_path_factory.mktemp("saved"))


def resume_errors(saved: Saved, tmp_path: Path, source: Layout, target: Layout) -> list[str]:
    """Resume a run saved at 10 under `target` to 15, and from there under `source` to the end."""
    whole = saved.run(source)
    shutil.copytree(Path(whole["logging"]["directory"]) / "run", tmp_path / "run")
    for step in (15, 20):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    here = whole["logging"] | {"directory": str(tmp_path)}
    shorter = {**whole["training"], "steps": 16}
    first = layout(whole, target, logging=here, training=shorter)
    run_ranks(train, target[1], first)
    second = layout(whole, source, logging=here)
    run_ranks(train, source[1], second)
    assert [row["step"] for row in rows(second) if row["attempt"] == 1] == list(range(11, 17))
    assert [row["step"] for row in rows(second) if row["attempt"] == 2] == list(range(17, 21))
    pairs = zip(curve(second, 11), curve(whole, 11), strict=True)
    return [
        f"step {step}: {found}, expected {expected}"
        for step, (found, expected) in enumerate(pairs, 11)
        if found != pytest.approx(expected, rel=1e-5)
    ]


@pytest.mark.parametrize(("source", "target"), QUICK)
def test_resumes_on_another_layout(
    saved: Saved, tmp_path: Path, source: Layout, target: Layout
) -> None:
    assert resume_errors(saved, tmp_path, source, target) == []


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), EVERY)
def test_resumes_on_every_layout(
    saved: Saved, tmp_path: Path, source: Layout, target: Layout
) -> None:
    assert resume_errors(saved, tmp_path, source, target) == []
