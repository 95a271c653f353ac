"""An entry of the ledger has all that its kind is read for, or no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import CheckpointError
from megalite.parallel import Grid
from megalite.train.ledger import Ledger, read_notes

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
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = Ledger(tmp_path, grid, 16)
    ledger.begin(tmp_path)
    assert ledger.entries == ENTRIES
    (tmp_path / "ledger.json").write_text(json.dumps({"entries": [entry]}))
    with pytest.raises(CheckpointError, match="entries are not those of a run"):
        read_notes(tmp_path)
