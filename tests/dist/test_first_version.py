"""A run file, shards and a checkpoint of MegaLite 0.1 can be loaded, and the run resumes.

`tests/fixtures/first_version.tar.gz` contains a run on 2 tensor ranks after step 3 of 6, and the
rows of its steps 4 to 6. Text and tokenizer are generated.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from megalite.formats.verify import verify_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, train, zero

ARCHIVE = Path(__file__).resolve().parents[1] / "fixtures/first_version.tar.gz"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the run file, and change to a folder that contains the other files."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("run.json").read_text())  # type: ignore[no-any-return]


def test_shards_of_the_first_version_are_valid(stored: dict[str, Any]) -> None:
    for source in stored["data"]["train"] + stored["data"]["valid"]:
        assert verify_folder(Path(source["path"])) == []


@pytest.mark.parametrize(("tensor", "ranks", "stage"), [(2, 2, 1), (1, 1, 0), (1, 2, 3)])
def test_run_of_the_first_version_resumes(
    stored: dict[str, Any], tensor: int, ranks: int, stage: int
) -> None:
    raw = stored | {"parallel": {"tensor": tensor}, "deepspeed": zero(stage)}
    run_ranks(train, ranks, raw)
    expected = [json.loads(line) for line in Path("continuation.jsonl").read_text().splitlines()]
    steps = [(row["loss"], row["grad_norm"]) for row in expected if row["kind"] == "train"]
    for pair, expected_pair in zip(curve(raw, first=4), steps, strict=True):
        assert pair == pytest.approx(expected_pair, rel=2e-6)
    [valid] = [row["loss"] for row in expected if row["kind"] == "valid"]
    assert rows(raw, "valid")[-1]["loss"] == pytest.approx(valid, rel=1e-6)
    [start] = [row for row in rows(raw, "event") if row["name"] == "resume"]
    assert start["step"] == 3
