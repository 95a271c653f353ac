"""What was done about bad numbers, kept so that every later start does it again.

A run's updates depend on what was left out of them: an update, or the data around a jump of the
loss. Each such intervention is a line of the run's `ledger.jsonl`, synced before it takes effect,
and part of every later checkpoint (`ledger.json`); a start from an earlier one repeats it.
"""

from __future__ import annotations

import json
import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from megalite import files
from megalite.errors import CheckpointError
from megalite.log import logger
from megalite.parallel import Grid

_NAME = "ledger.jsonl"
IN_CHECKPOINT = "ledger.json"

Entry = dict[str, Any]


class Ledger:
    """The interventions of a run, alike on every rank, and the numbers they are judged by.

    An entry has a `kind` ("skip" or "rollback"), `step` and `samples` (the place before that step),
    and a `reason`; a rollback also the step gone back `to` and the `gap`, [first, last) of the data
    order, that is left out from then on.

    Attributes:
        entries: in the order they were made.
        recent: loss and gradient norm of the last steps that were taken.
    """

    def __init__(self, folder: Path, grid: Grid, window: int) -> None:
        self._path, self._grid = folder / _NAME, grid
        self.entries: list[Entry] = []
        self.recent: deque[tuple[float, float]] = deque(maxlen=window)

    def begin(self, origin: Path | None) -> None:
        """Take up the ledger of a checkpoint and what the run has added since; a collective.

        Args:
            origin: the checkpoint to go on from; None begins anew.
        """
        own, content, fault = list[Entry](), dict[str, Any](), None
        if self._grid.rank == 0:
            if origin is None:
                self._write({"kind": "start"})
            else:
                own = _read_lines(self._path)
                try:
                    content = files.read_object(origin / IN_CHECKPOINT)
                    _check_content(content)
                except FileNotFoundError:  # of a version without one
                    content = {}
                except (OSError, ValueError) as error:  # told to all: none is left waiting
                    fault = f"{origin / IN_CHECKPOINT} cannot be read: {error}"
        own, content, fault = self._grid.gather((own, content, fault))[0]
        if fault:
            raise CheckpointError(fault)
        before = content.get("entries", [])
        self.entries = before + [entry for entry in own if entry not in before]
        self.recent.clear()
        self.recent.extend((loss, norm) for loss, norm in content.get("recent", []))

    def add(self, entry: Entry) -> None:
        """Make an entry, on every rank alike; rank 0 writes it."""
        self.entries.append(entry)
        if self._grid.rank == 0:
            self._write(entry)

    def content(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"entries": list(self.entries), "recent": list(self.recent)}

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """What the data order leaves out: [first, last) each, ascending and apart."""
        joined: list[tuple[int, int]] = []
        for first, last in sorted(e["gap"] for e in self.entries if e["kind"] == "rollback"):
            if joined and first <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
            else:
                joined.append((first, last))
        return tuple(joined)

    @property
    def rollbacks(self) -> int:
        return sum(entry["kind"] == "rollback" for entry in self.entries)

    def skipped(self, step: int, samples: int | None = None) -> Entry | None:
        """The entry that left out the update of a step, at that place of the data order."""
        for entry in reversed(self.entries):
            if entry["kind"] != "skip" or entry["step"] != step:
                continue
            if samples in (None, entry["samples"]):
                return entry
        return None

    def _write(self, entry: Entry) -> None:
        try:
            with open(self._path, "ab+") as file:
                # not behind a line that a crash cut short
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                start = b"\n" if file.read(1) not in (b"", b"\n") else b""
                file.write(start + json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # it is still part of every later checkpoint
            logger.warning("%s cannot be written: %s; the run goes on", self._path, error)


def _read_lines(path: Path) -> list[Entry]:
    """The entries since the run last began anew; one cut by a crash, or damaged, has no effect."""
    entries: list[Entry] = []
    damaged = 0
    with suppress(OSError):
        for entry in files.each_row(path):
            if entry is not None and entry.get("kind") == "start":
                entries, damaged = [], 0
            elif entry is not None and _is_sound(entry):
                entries.append(entry)
            else:
                damaged += 1
    if damaged:
        logger.warning("%s: %d damaged lines have no effect; the run goes on", path, damaged)
    return entries


def _is_sound(entry: Any) -> bool:
    """Whether an entry has what its kind is read for."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        return False
    needed = {"skip": ("step", "samples"), "rollback": ("step", "to"), "measured": ("step",)}
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
    """Refuse what no checkpoint's ledger holds; ValueError."""
    entries, recent = content.get("entries", []), content.get("recent", [])
    if not isinstance(entries, list) or not all(map(_is_sound, entries)):
        raise ValueError("its entries are not those of a run")
    for pair in recent if isinstance(recent, list) else [None]:
        numbers = isinstance(pair, list) and [type(item) in (int, float) for item in pair]
        if numbers != [True, True]:
            raise ValueError("its recent losses are not pairs of numbers")
