"""Record of interventions against bad numbers, so that every later start repeats them.

A run's updates depend on what was omitted: an update, or the data around a spike of the loss. Each
such intervention is a line of the run's `interventions.jsonl`, synced before it takes effect, and
part of every later checkpoint (`ledger.json`). A start from an earlier checkpoint repeats it. A run
that has a `ledger.jsonl`, the earlier name, goes on in that file.
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
_OLD_NAME = "ledger.jsonl"  # runs begun under this name go on in it
IN_CHECKPOINT = "ledger.json"
_POSITION = ("step", "samples")

Entry = dict[str, Any]


def order_id(fingerprint: str, data: DataConfig) -> str:
    """Return a short name of a data order. Positions in one order mean nothing in another."""
    content = json.dumps([fingerprint, data.sequence_length, data.seed])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def joined_gaps(entries: Iterable[Entry], order: str | None) -> tuple[tuple[int, int], ...]:
    """Return the gaps of one data order: [first, last) each, ascending, none touching another."""
    joined: list[tuple[int, int]] = []
    own = (entry for entry in entries if entry["kind"] == "rollback" and _is_of(entry, order))
    for first, last in sorted(entry["gap"] for entry in own):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple(joined)


def _is_of(entry: Mapping[str, Any], order: str | None) -> bool:
    return order is None or entry.get("order", order) == order


def read_notes(folder: Path) -> dict[str, Any]:
    """Return the interventions that a checkpoint contains; old versions wrote none.

    Raises:
        CheckpointError: it cannot be read.
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
    """Interventions of a run, identical on every rank, and the numbers that spikes are found by.

    An entry has a `kind` ("skip", "rollback" or "measured"), and `step` and `samples`, the position
    before that step. `order` names the data order that `samples` counts in. A skip and a rollback
    have a `reason`. A rollback also has the step it goes back `to` and the `gap`, [first, last) of
    the data order, that is omitted from then on.

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
            checkpoint: folder of the checkpoint to go on from. None begins without entries.
            order: data order of this start. Entries of another order omit no data.
            before: data order of the checkpoint, for entries that name none.
        Raises:
            CheckpointError: on every rank, if the checkpoint's entries cannot be read.
        """
        own = list[Entry]()
        content: dict[str, Any] = {}
        fault = None
        if self._grid.rank == 0:
            if checkpoint is None:
                self._write({"kind": "start"})
            else:
                own = _read_lines(self._path)
                try:
                    content = read_notes(checkpoint)
                except CheckpointError as error:  # raised on every rank, so that none waits
                    fault = str(error)
        own, content, fault = self._grid.all_gather_objects((own, content, fault))[0]
        if fault:
            raise CheckpointError(fault)
        self._order = order
        named = {} if before is None else {"order": before}
        saved = [named | entry for entry in content.get("entries", [])]
        added = [named | entry for entry in own]
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
        """Return the JSON value that a checkpoint keeps."""
        return {"entries": list(self.entries), "recent": list(self.recent)}

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Parts of the present data order that are omitted, as `joined_gaps` returns them."""
        return joined_gaps(self.entries, self._order)

    def is_current(self, entry: Entry) -> bool:
        """Return whether an entry's position is in the present data order."""
        return _is_of(entry, self._order)

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks so far."""
        return sum(entry["kind"] == "rollback" for entry in self.entries)

    def skipped(self, step: int, samples: int | None = None) -> Entry | None:
        """Return the entry that omitted a step's update, at that position of the data order."""
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
    """Return the file of a run folder's interventions: the old one if the run has begun it."""
    old = folder / _OLD_NAME
    return old if old.is_file() else folder / _NAME


def _read_lines(path: Path) -> list[Entry]:
    """Return the entries since the run last began; a damaged line has no effect."""
    entries: list[Entry] = []
    damaged = 0
    with suppress(OSError):
        for entry in files.each_row(path):
            if entry is not None and entry.get("kind") == "start":
                entries = []
                damaged = 0
            elif entry is not None and _is_sound(entry):
                entries.append(entry)
            else:
                damaged += 1
    if damaged:
        logger.warning("%s: %d damaged lines have no effect; the run goes on", path, damaged)
    return entries


def _is_sound(entry: Any) -> bool:
    """Return whether an entry has every key that its kind is read for. Others have no effect."""
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
    """Raise ValueError for content that no run writes into a checkpoint."""
    entries = content.get("entries", [])
    recent = content.get("recent", [])
    if not isinstance(entries, list) or not all(map(_is_sound, entries)):
        raise ValueError("its entries are not those of a run")
    for pair in recent if isinstance(recent, list) else [None]:
        numbers = isinstance(pair, list) and [type(item) in (int, float) for item in pair]
        if numbers != [True, True]:
            raise ValueError("its recent losses are not pairs of numbers")
