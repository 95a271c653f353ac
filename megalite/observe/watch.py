"""Phases of a run, their time, and a watchdog against hangs.

A run is always in one phase: setup, step, eval, save and others. `PhaseTimer` measures phases.
`Watchdog` ends a process whose phase lasts far longer than any before. If one rank hangs, all
others wait in a collective. So every rank detects the hang by its own clock, and writes the stacks
of its threads into the run folder. The culprit is the rank that wrote no stack file. If all wrote
one, it is the rank furthest behind, or the only one not waiting in a collective.
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
_STOPPED = 3.0  # seconds between two polls after which the process was suspended, not slow
_GATHER = 5.0  # seconds for the other ranks to write their stacks
_SAFETY = 60.0  # seconds after which the interpreter itself counts as stuck
_FACTOR = 10  # a phase hangs after this many times its longest recent duration
_STANDARD_ERROR = 2  # file descriptor; a notebook's stream has none
_RECENT = 32  # durations kept per phase, so that a first step that compiles is forgotten
_WAITING = ("torch/distributed/", "deepspeed/comm/", "torch/autograd/graph.py")


class PhaseTimer:
    """Timer of a run's phases. A phase's time excludes its inner phases.

    Args:
        began: the time of `time.monotonic` at which setup began. None means the start of the
            process, so that imports count as setup.

    Attributes:
        name: name of the current phase.
        count: number of phase changes so far; identical on ranks that do the same.
        seconds: seconds spent in each phase, without inner phases.
    """

    def __init__(self, began: float | None = None) -> None:
        self.name = "setup"
        self.count = 0
        self.seconds: dict[str, float] = {}
        self._recent: dict[str, deque[float]] = {}
        self._spent = 0.0  # by the current phase, before an inner one
        if began is None:
            began = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._since = began

    def begin(self, name: str) -> None:
        """Switch to a phase. Each step begins the step phase again."""
        self._account()
        self._end()
        self._switch(name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Enter an inner phase for the block. Wait for the device before and after it."""
        _synchronize()
        self._account()
        outer = self.name
        spent = self._spent
        self._spent = 0.0
        self._switch(name)
        try:
            yield
        finally:
            _synchronize()
            self._account()
            self._end()
            self._switch(outer)
            self._spent = spent

    def _switch(self, name: str) -> None:
        # set the name first: the watchdog's thread reads the name after the count
        self.name = name
        self.count += 1

    def totals(self) -> dict[str, float]:
        """Return the seconds spent in each phase until now."""
        self._account()
        return dict(self.seconds)

    def longest(self, name: str) -> float | None:
        """Return the longest recent duration of a phase, in seconds."""
        recent = self._recent.get(name)
        return max(recent) if recent else None

    def _account(self) -> None:
        now = time.monotonic()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self._since
        self._spent += now - self._since
        self._since = now

    def _end(self) -> None:
        self._recent.setdefault(self.name, deque(maxlen=_RECENT)).append(self._spent)
        self._spent = 0.0


@dataclass
class Watchdog:
    """Thread that ends this process, and so the job, when a phase lasts too long.

    Args:
        folder: the run folder; stacks go to `stacks/attempt_N/rank_M.txt`.
        hosts: hosts of all ranks, by rank.
        report: called on one rank with a description of the hang, before the process ends.
    """

    phases: PhaseTimer
    guards: GuardsConfig
    folder: Path
    attempt: int
    rank: int
    hosts: Sequence[str]
    report: Callable[[str], None]

    def __post_init__(self) -> None:
        self._stacks = self.folder / "stacks" / f"attempt_{self.attempt}"
        self._trains = threading.get_ident()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def budget(self, name: str) -> float:
        """Return the seconds that a phase may last."""
        longest = self.phases.longest(name)
        guards = self.guards
        if longest is None or name == "setup":
            return max(guards.hang_setup_seconds, guards.hang_seconds)
        return max(guards.hang_seconds, _FACTOR * longest)

    def _watch(self) -> None:
        phases = self.phases
        count = -1
        since = 0.0
        before = time.monotonic()
        while not self._closing.wait(_POLL):
            now = time.monotonic()
            if now - before > _STOPPED:  # the process was suspended: Ctrl-Z, or a laptop's sleep
                since += now - before
            before = now
            if phases.count != count:
                count = phases.count
                since = now
            budget = self.budget(phases.name)
            lasted = now - since
            # if the interpreter itself hangs, and this thread with it, C code writes the stacks
            late = max(1.0, budget - lasted) + _SAFETY
            faulthandler.dump_traceback_later(late, file=_STANDARD_ERROR)
            # check the shared file system only if another rank may have detected a hang
            others = lasted > budget / 2 and self._stacks.exists()
            if (lasted > budget or others) and phases.count == count:
                self._end(phases.name, lasted, budget)

    def _end(self, phase: str, lasted: float, budget: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):
            self._write(phase, lasted, budget)
            time.sleep(_GATHER)
            facts = _read(self._stacks)
            if facts and min(facts) == self.rank:
                self.report(
                    f"hang: {describe_culprit(facts, self.hosts)}; stacks in {self._stacks}"
                )
        sys.stderr.flush()
        os._exit(1)

    def _write(self, phase: str, lasted: float, budget: float) -> None:
        frame = sys._current_frames().get(self._trains)
        names = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_stack(frame)]
        fact = {
            "section": phase,
            "seconds": round(lasted, 1),
            "budget": round(budget, 1),
            "count": self.phases.count,
            "waits": any(part in name for name in names for part in _WAITING),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._stacks.mkdir(parents=True, exist_ok=True)
        with open(self._stacks / f"rank_{self.rank:05d}.txt", "w", encoding="utf-8") as file:
            file.write(json.dumps(fact) + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def describe_culprit(facts: dict[int, dict[str, Any]], hosts: Sequence[str]) -> str:
    """Describe the ranks that caused a hang.

    Args:
        facts: first line of each rank's stack file, by rank.
        hosts: hosts of all ranks, by rank.
    """
    first = facts[min(facts)]
    state = f"phase {first['section']} did not end within {first['seconds']:.0f} s"
    silent = [rank for rank in range(len(hosts)) if rank not in facts]
    least = min(fact["count"] for fact in facts.values())
    behind = [rank for rank, fact in facts.items() if fact["count"] == least]
    alone = [rank for rank, fact in facts.items() if not fact["waits"]]
    for ranks, why in (
        (silent, "no longer runs"),
        (behind if len(behind) < len(facts) else [], "is behind the others"),
        (
            alone if len(alone) < len(facts) else [],
            "does not wait in a collective, unlike the others",
        ),
    ):
        if ranks:
            named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in sorted(ranks)[:8])
            more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
            return f"{state}: {named}{more} {why}"
    return f"{state}: all ranks are at the same point"


def _read(folder: Path) -> dict[int, dict[str, Any]]:
    facts = {}
    for path in folder.glob("rank_*.txt"):
        # a file may be incomplete, because its rank still writes it
        with suppress(OSError, ValueError), open(path, "rb") as file:
            fact = parse_json(file.readline())
            if isinstance(fact, dict) and {"section", "seconds", "count", "waits"} <= {*fact}:
                facts[int(path.stem.removeprefix("rank_"))] = fact
    return facts


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
