"""Log of interventions against bad numbers, so that every later start repeats them.

An intervention skips an update, or the data around a loss spike. It is a line of the run's
`interventions.jsonl`, synced before it takes effect. It is also part of every later checkpoint
(`ledger.json`). A start from an earlier checkpoint repeats it. If a run has a `ledger.jsonl`, the
earlier name, the log continues in that file.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megalite import files
from megalite.config import DataConfig
from megalite.errors import CheckpointError
from megalite.log import logger
from megalite.parallel import Grid

_NAME = "interventions.jsonl"
_OLD_NAME = "ledger.jsonl"  # runs that began with this file continue it
IN_CHECKPOINT = "ledger.json"
_POSITION = ("step", "samples")

Entry = dict[str, Any]


def order_id(fingerprint: str, data: DataConfig) -> str:
    """Return a short id of a data order. Positions in one order mean nothing in another."""
    content = json.dumps([fingerprint, data.sequence_length, data.seed])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def joined_gaps(entries: Iterable[Entry], order: str | None) -> tuple[tuple[int, int], ...]:
    """Return the gaps of a data order, [first, last) each, sorted. Touching gaps are joined."""
    joined: list[tuple[int, int]] = []
    rollbacks = (e for e in entries if e["kind"] == "rollback" and _is_in_order(e, order))
    for first, last in sorted(entry["gap"] for entry in rollbacks):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple(joined)


def _is_in_order(entry: Mapping[str, Any], order: str | None) -> bool:
    return order is None or entry.get("order", order) == order


def read_interventions(folder: Path) -> dict[str, Any]:
    """Return the interventions in a checkpoint. Checkpoints of old versions have none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / IN_CHECKPOINT
    try:
        content = files.read_object(path)
        _check_content(content)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return content


class InterventionLog:
    """Interventions of a run, identical on every rank, and recent losses to detect spikes.

    An entry has a `kind` ("skip", "rollback" or "measured"), a `step`, and the position `samples`
    before that step. `order` is the data order that `samples` counts in. A skip and a rollback have
    a `reason`. A rollback also has the step to return `to`, and a `gap`. The gap is the part
    [first, last) of the data order that is omitted from then on.

    Attributes:
        entries: interventions, oldest first.
        recent: loss and gradient norm of the last steps whose updates were used.
    """

    def __init__(self, folder: Path, grid: Grid, window: int) -> None:
        self._path = _path_in(folder)
        self._grid = grid
        self.entries: list[Entry] = []
        self._order: str | None = None
        self.recent: deque[tuple[float, float]] = deque(maxlen=window)

    def begin(
        self, checkpoint: Path | None, *, order: str | None = None, before: str | None = None
    ) -> None:
        """Continue from a checkpoint's entries and those added since; a collective.

        Args:
            checkpoint: folder of the checkpoint to resume from. None begins without entries.
            order: data order of this start. Entries of another order omit no data.
            before: data order of the checkpoint, for entries without an order.
        Raises:
            CheckpointError: on every rank, if the checkpoint's entries cannot be read.
        """
        lines = list[Entry]()
        content: dict[str, Any] = {}
        fault = None
        if self._grid.rank == 0:
            if checkpoint is None:
                self._write({"kind": "start"})
            else:
                lines = _read_lines(self._path)
                try:
                    content = read_interventions(checkpoint)
                except CheckpointError as error:  # raised on every rank, so that none waits
                    fault = str(error)
        lines, content, fault = self._grid.all_gather_objects((lines, content, fault))[0]
        if fault:
            raise CheckpointError(fault)
        self._order = order
        default = {} if before is None else {"order": before}
        saved = [default | entry for entry in content.get("entries", [])]
        added = [default | entry for entry in lines]
        self.entries = saved + [entry for entry in added if entry not in saved]
        self.recent.clear()
        self.recent.extend((loss, norm) for loss, norm in content.get("recent", []))

    def add(self, entry: Entry) -> None:
        """Add an entry, identical on every rank; rank 0 writes it."""
        if self._order is not None:
            entry = entry | {"order": self._order}
        self.entries.append(entry)
        if self._grid.rank == 0:
            self._write(entry)

    def content(self) -> dict[str, Any]:
        """Return the JSON value for a checkpoint."""
        return {"entries": list(self.entries), "recent": list(self.recent)}

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Omitted parts of the current data order, as returned by `joined_gaps`."""
        return joined_gaps(self.entries, self._order)

    def is_current(self, entry: Entry) -> bool:
        """Return whether an entry's position is in the current data order."""
        return _is_in_order(entry, self._order)

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks so far."""
        return sum(entry["kind"] == "rollback" for entry in self.entries)

    def skipped(self, step: int, samples: int | None = None) -> Entry | None:
        """Return the entry that skipped a step's update, or None.

        Args:
            samples: position of the step in the data order. None means any.
        """
        for entry in reversed(self.entries):
            same = entry["kind"] == "skip" and entry["step"] == step
            if same and samples in (None, entry["samples"]) and self.is_current(entry):
                return entry
        return None

    def _write(self, entry: Entry) -> None:
        try:
            files.append_line(self._path, json.dumps(entry).encode(), sync=True)
        except OSError as error:  # the entry is still part of every later checkpoint
            logger.warning("%s cannot be written: %s; the run goes on", self._path, error)


def _path_in(folder: Path) -> Path:
    """Return the path of a run's log, which has the old name if that file exists."""
    old = folder / _OLD_NAME
    return old if old.is_file() else folder / _NAME


def _read_lines(path: Path) -> list[Entry]:
    """Return the entries since the last fresh start. Damaged lines are ignored."""
    entries: list[Entry] = []
    damaged = 0
    with suppress(OSError):
        for entry in files.each_row(path):
            if entry is not None and entry.get("kind") == "start":
                entries = []
                damaged = 0
            elif entry is not None and _is_valid(entry):
                entries.append(entry)
            else:
                damaged += 1
    if damaged:
        logger.warning("%s: %d damaged lines are ignored; the run goes on", path, damaged)
    return entries


def _is_valid(entry: Any) -> bool:
    """Return whether an entry has all keys that are needed for its kind."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        return False
    needed = {"skip": _POSITION, "rollback": ("step", "to"), "measured": _POSITION}
    if not all(_is_count(entry.get(key)) for key in needed.get(entry["kind"], ())):
        return False
    if entry["kind"] == "measured":
        return type(entry.get("score")) in (int, float)
    if entry["kind"] != "rollback":
        return True
    gap = entry.get("gap")
    return isinstance(gap, list) and len(gap) == 2 and all(map(_is_count, gap)) and gap[0] <= gap[1]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_content(content: dict[str, Any]) -> None:
    """Raise ValueError if the content of a checkpoint is invalid."""
    entries = content.get("entries", [])
    recent = content.get("recent", [])
    if not isinstance(entries, list) or not all(map(_is_valid, entries)):
        raise ValueError("its entries are invalid")
    for pair in recent if isinstance(recent, list) else [None]:
        numbers = isinstance(pair, list) and [type(item) in (int, float) for item in pair]
        if numbers != [True, True]:
            raise ValueError("its recent losses are not pairs of numbers")
