"""What a run is doing, for how long, and whether it still does it.

A run is always in one section: setup, step, eval or save. `Sections` measures them; `Watchdog` ends
a process whose section goes on for longer than it has ever had reason to. One rank that hangs
leaves all others waiting in a collective, each with its own clock, so every rank finds the hang by
itself and writes the stacks of its threads into the run folder; whoever has written none is the one
that no longer runs, and otherwise the rank furthest behind, or the one that waits for nobody, is.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from megalite.config import GuardsConfig
from megalite.files import parse_json

_POLL = 0.5  # seconds
_STOPPED = 3.0  # seconds between two polls that no busy host explains
_GATHER = 5.0  # seconds for the other ranks to write their stacks
_SAFETY = 60.0  # seconds after which the interpreter itself is taken to be stuck
_FACTOR = 10  # times the longest
_KEPT = 32  # durations of a section; a first step that compiles is forgotten
_WAITING = ("torch/distributed/", "deepspeed/comm/", "torch/autograd/graph.py")


class Sections:
    """Where the main thread is. Time in an inner section is not the outer one's.

    Attributes:
        name: of the section it is in.
        count: grows with every change, alike on ranks that do the same.
        seconds: spent in each section, without its inner ones.
    """

    def __init__(self) -> None:
        self.name, self.count = "setup", 0
        self.seconds: dict[str, float] = {}
        self._recent: dict[str, deque[float]] = {}
        self._spent = 0.0  # by the present section before an inner one
        # from when the process was started: its imports are setup, too
        self._since = time.monotonic() - (time.time() - psutil.Process().create_time())

    def enter(self, name: str) -> None:
        """Leave the section at hand for another, or begin it again, as each step does."""
        self._account()
        self._end()
        self.name, self.count = name, self.count + 1

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """An inner section, waiting for the device on both sides."""
        _synchronize()
        self._account()
        outer, spent, self._spent = self.name, self._spent, 0.0
        self.name, self.count = name, self.count + 1
        try:
            yield
        finally:
            _synchronize()
            self._account()
            self._end()
            self.name, self.count, self._spent = outer, self.count + 1, spent

    def totals(self) -> dict[str, float]:
        """Seconds in each section until now."""
        self._account()
        return dict(self.seconds)

    def longest(self, name: str) -> float | None:
        """Seconds that the longest of its last occurrences took."""
        recent = self._recent.get(name)
        return max(recent) if recent else None

    def _account(self) -> None:
        now = time.monotonic()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self._since
        self._spent += now - self._since
        self._since = now

    def _end(self) -> None:
        self._recent.setdefault(self.name, deque(maxlen=_KEPT)).append(self._spent)
        self._spent = 0.0


@dataclass
class Watchdog:
    """Ends this process, and so the job, when its section lasts too long.

    Args:
        folder: the run folder; stacks go to `stacks/attempt_N/rank_M.txt`.
        hosts: of all ranks, in their order.
        report: called on one rank with what was found, before the end.
    """

    sections: Sections
    guards: GuardsConfig
    folder: Path
    attempt: int
    rank: int
    hosts: Sequence[str]
    report: Callable[[str], None]

    def __post_init__(self) -> None:
        self._stacks = self.folder / "stacks" / f"attempt_{self.attempt}"
        self._main = threading.main_thread().ident
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def budget(self, name: str) -> float:
        """Seconds a section may last."""
        longest, guards = self.sections.longest(name), self.guards
        if longest is None or name == "setup":
            return max(guards.hang_setup_seconds, guards.hang_seconds)
        return max(guards.hang_seconds, _FACTOR * longest)

    def _watch(self) -> None:
        count, since, before = -1, 0.0, time.monotonic()
        while not self._closing.wait(_POLL):
            now, sections = time.monotonic(), self.sections
            if now - before > _STOPPED:  # this process as a whole: Ctrl-Z, a laptop that slept
                since += now - before
            before = now
            if sections.count != count:
                count, since = sections.count, now
            budget, lasted = self.budget(sections.name), now - since
            # should the interpreter itself hang, with this thread: its stacks, from C
            faulthandler.dump_traceback_later(max(1.0, budget - lasted) + _SAFETY)
            # what another rank has found is looked for only when it is likely
            others = lasted > budget / 2 and self._stacks.exists()
            if (lasted > budget or others) and sections.count == count:
                self._end(sections.name, lasted, budget)

    def _end(self, section: str, lasted: float, budget: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):
            self._write(section, lasted, budget)
            time.sleep(_GATHER)
            told = _read(self._stacks)
            if told and min(told) == self.rank:
                self.report(f"hang: {find_late(told, self.hosts)}; stacks in {self._stacks}")
        sys.stderr.flush()
        os._exit(1)

    def _write(self, section: str, lasted: float, budget: float) -> None:
        frame = sys._current_frames().get(self._main or 0)
        names = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_stack(frame)]
        fact = {
            "section": section,
            "seconds": round(lasted, 1),
            "budget": round(budget, 1),
            "count": self.sections.count,
            "waits": any(part in name for name in names for part in _WAITING),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._stacks.mkdir(parents=True, exist_ok=True)
        with open(self._stacks / f"rank_{self.rank:05d}.txt", "w", encoding="utf-8") as file:
            file.write(json.dumps(fact) + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def find_late(told: dict[int, dict[str, Any]], hosts: Sequence[str]) -> str:
    """Which ranks the others wait for, in words.

    Args:
        told: what each rank that still runs has written, by rank.
        hosts: of all ranks.
    """
    first = told[min(told)]
    state = f"no end of {first['section']} after {first['seconds']:.0f} s"
    silent = [rank for rank in range(len(hosts)) if rank not in told]
    least = min(fact["count"] for fact in told.values())
    behind = [rank for rank, fact in told.items() if fact["count"] == least]
    alone = [rank for rank, fact in told.items() if not fact["waits"]]
    for ranks, why in (
        (silent, "no longer runs"),
        (behind if len(behind) < len(told) else [], "is behind the others"),
        (alone if len(alone) < len(told) else [], "waits for nobody while the others wait"),
    ):
        if ranks:
            named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in sorted(ranks)[:8])
            more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
            return f"{state}: {named}{more} {why}"
    return f"{state}: all ranks stand at the same place"


def _read(folder: Path) -> dict[int, dict[str, Any]]:
    told = {}
    for path in folder.glob("rank_*.txt"):
        # not one that is still being written
        with suppress(OSError, ValueError), open(path, "rb") as file:
            fact = parse_json(file.readline())
            if isinstance(fact, dict) and {"section", "seconds", "count", "waits"} <= {*fact}:
                told[int(path.stem.removeprefix("rank_"))] = fact
    return told


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
