# covers: megalite/train/interventions.py
"""The intervention log ignores incomplete entries, and continues files of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import CheckpointError
from megalite.parallel import Grid
from megalite.train.interventions import InterventionLog, read_interventions

ENTRIES: list[dict[str, Any]] = [
    {"kind": "skip", "step": 2, "samples": 8, "reason": "loss nan"},
    {"kind": "rollback", "step": 9, "samples": 64, "to": 1, "gap": [8, 24]},
    {"kind": "measured", "step": 3, "samples": 12, "score": 0.5},
]
# the keys of each kind that the code reads; "samples" of a rollback is only information
READ = [("skip", "step samples"), ("rollback", "step to gap"), ("measured", "step samples score")]
INCOMPLETE = [
    {key: value for key, value in entry.items() if key != missing}
    for entry, (_, keys) in zip(ENTRIES, READ, strict=True)
    for missing in keys.split()
]


@pytest.mark.parametrize("entry", INCOMPLETE)
def test_entry_that_lacks_a_key_is_ignored(
    grid: Grid, tmp_path: Path, entry: dict[str, Any]
) -> None:
    rows = [{"kind": "start"}, *ENTRIES, entry]
    write(tmp_path / "interventions.jsonl", rows)
    log = InterventionLog(tmp_path, grid, 16)
    log.begin(tmp_path)
    assert log.entries == ENTRIES
    (tmp_path / "ledger.json").write_text(json.dumps({"entries": [entry]}))
    with pytest.raises(CheckpointError, match="entries are invalid"):
        read_interventions(tmp_path)


@pytest.mark.parametrize("name", ["ledger.jsonl", "interventions.jsonl"])
def test_log_continues_the_file_of_the_run(grid: Grid, tmp_path: Path, name: str) -> None:
    """A run of an earlier version has ledger.jsonl, a new one interventions.jsonl."""
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
