# covers: megalite/train/interventions.py
"""An entry has every key that its kind is read for, or no effect; files of earlier runs go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import CheckpointError
from megalite.parallel import Grid
from megalite.train.interventions import InterventionLog, read_notes

ENTRIES: list[dict[str, Any]] = [
    {"kind": "skip", "step": 2, "samples": 8, "reason": "loss nan"},
    {"kind": "rollback", "step": 9, "samples": 64, "to": 1, "gap": [8, 24]},
    {"kind": "measured", "step": 3, "samples": 12, "score": 0.5},
]
# what a rollback is read for; "samples" is for people alone
READ = [("skip", "step samples"), ("rollback", "step to gap"), ("measured", "step samples score")]
LACKING = [
    {key: value for key, value in entry.items() if key != left_out}
    for entry, (_, keys) in zip(ENTRIES, READ, strict=True)
    for left_out in keys.split()
]


@pytest.mark.parametrize("entry", LACKING)
def test_an_entry_that_lacks_a_key_has_no_effect(
    grid: Grid, tmp_path: Path, entry: dict[str, Any]
) -> None:
    rows = [{"kind": "start"}, *ENTRIES, entry]
    write(tmp_path / "interventions.jsonl", rows)
    log = InterventionLog(tmp_path, grid, 16)
    log.begin(tmp_path)
    assert log.entries == ENTRIES
    (tmp_path / "ledger.json").write_text(json.dumps({"entries": [entry]}))
    with pytest.raises(CheckpointError, match="entries are not those of a run"):
        read_notes(tmp_path)


@pytest.mark.parametrize("name", ["ledger.jsonl", "interventions.jsonl"])
def test_log_goes_on_in_the_file_that_the_run_has(grid: Grid, tmp_path: Path, name: str) -> None:
    """A run of an earlier version has ledger.jsonl; a new one gets interventions.jsonl."""
    if name == "ledger.jsonl":
        write(tmp_path / name, [{"kind": "start"}, ENTRIES[0]])
    log = InterventionLog(tmp_path, grid, 16)
    log.begin(tmp_path if name == "ledger.jsonl" else None)
    log.add(ENTRIES[1])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    later = InterventionLog(tmp_path, grid, 16)
    later.begin(tmp_path)
    assert later.entries == (ENTRIES[:2] if name == "ledger.jsonl" else ENTRIES[1:2])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
