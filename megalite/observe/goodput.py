"""Use of a run's time, from its own records: training, other work, restarts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megalite.errors import CommandError
from megalite.files import each_row, read_json

_SET_BACK = 60.0  # seconds; less is what the clocks of two hosts may differ by
_ENDS = ("end", "stopped", "failed", "superseded", "hang")


@dataclass
class Attempt:
    """One start of the run.

    Attributes:
        first, last: the step it went on from, and the last one it recorded.
        seconds: in each section ("setup", "step", "eval", "save", ...).
        down: seconds between the end of the start before and this one's.
        redone: steps of it that a rollback threw away.
        lost: those, and the ones that the next start had to take again.
        cause: how it ended.
    """

    attempt: int
    first: int
    last: int
    seconds: dict[str, float]
    down: float = 0.0
    redone: int = 0
    lost: int = 0
    cause: str = "killed, or its host was lost: it left no word"
    began: float = field(default=0.0, repr=False)
    ended: float = field(default=0.0, repr=False)


def goodput(run: Path) -> dict[str, Any]:
    """Return the time of a run by what it went into.

    Returns:
        {run, state, attempts, lost_steps, restarts, wall_seconds, seconds, goodput,
        clock_set_back_seconds}: `seconds` sums up the sections of all attempts, what was done twice
        as "lost" and what lay between as "down"; goodput is the part of the wall's seconds that
        steps which counted took. If the clock was set back, time continues from the latest row.
    Raises:
        CommandError: no records there.
    """
    try:
        rows = [row for row in each_row(run / "metrics.jsonl") if row is not None]
        set_back, rows = _without_set_backs(rows)
        return _account(run, _attempts(rows)) | {"clock_set_back_seconds": set_back}
    except OSError as error:
        raise CommandError(f"{run}: no records of a run: {error.strerror}") from None
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CommandError(
            f"{run}/metrics.jsonl holds rows that no run writes: {type(error).__name__}: {error}"
        ) from None


def _account(run: Path, attempts: list[Attempt]) -> dict[str, Any]:
    if not attempts:
        raise CommandError(f"{run}: no metrics.jsonl with a start in it; give a run folder")
    attempts[-1].lost = attempts[-1].redone
    for before, after in pairwise(attempts):
        before.lost = before.redone + max(0, before.last - after.first)
        after.down = max(0.0, after.began - after.seconds.get("setup", 0.0) - before.ended)
    state = "unknown"
    with suppress(OSError, ValueError, KeyError, TypeError):
        state = read_json(run / "status.json")["state"]
    if state in ("running", "saving"):
        attempts[-1].cause = "running, or killed without a word"
    totals: dict[str, float] = {}
    for one in attempts:
        taken = one.last - one.first + one.redone
        lost = one.seconds.get("step", 0.0) * one.lost / max(1, taken)
        parts = {**one.seconds, "lost": lost, "down": one.down}
        parts["step"] = one.seconds.get("step", 0.0) - lost
        for name, seconds in parts.items():
            totals[name] = totals.get(name, 0.0) + seconds
    wall = attempts[-1].ended - attempts[0].began + attempts[0].seconds.get("setup", 0.0)
    told = [{k: v for k, v in asdict(a).items() if k not in ("began", "ended")} for a in attempts]
    return {
        "run": str(run),
        "state": state,
        "attempts": told,
        "lost_steps": sum(one.lost for one in attempts),
        "restarts": len(attempts) - 1,
        "wall_seconds": wall,
        "seconds": totals,
        "goodput": totals.get("step", 0.0) / wall if wall else 0.0,
    }


def _without_set_backs(rows: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """Return rows whose time never falls behind by more than a minute, and the seconds
    that it did.
    """
    found = list[dict[str, Any]]()
    latest = -math.inf
    shift = 0.0
    for row in rows:
        if not {"kind", "time", "attempt", "step"} <= {*row}:
            continue
        if not all(_is_number(row[key]) for key in ("time", "attempt", "step")):
            raise ValueError(f"time, attempt and step are no numbers in {row!s:.80}")
        if row["time"] + shift < latest - _SET_BACK:
            shift = latest - row["time"]
        latest = max(latest, row["time"] + shift)
        found.append({**row, "time": row["time"] + shift})
    return shift, found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15


def _attempts(rows: Iterable[dict[str, Any]]) -> list[Attempt]:
    found: dict[int, Attempt] = {}
    measured: dict[int, float] = {}  # until when an attempt's own clock has spoken
    for row in rows:
        number, time = row["attempt"], row["time"]
        name = row.get("name")
        if name in ("start", "resume"):
            found[number] = Attempt(number, row["step"], row["step"], {}, began=time)
            measured[number] = time
        if (one := found.get(number)) is None:
            continue
        one.ended = time
        one.last = max(one.last, row["step"])
        if name == "rollback":
            one.redone += row["step"] - 1 - row["to"]
        # a slow rank's are of one forward pass
        if name != "straggler" and (seconds := row.get("seconds")):
            if not all(map(_is_number, seconds.values())):
                raise ValueError(f"seconds are no numbers in {row!s:.80}")
            one.seconds = {part: float(value) for part, value in seconds.items()}
            measured[number] = time
        elif row["kind"] == "train":  # of a start that was killed later
            one.seconds["step"] = one.seconds.get("step", 0.0) + time - measured[number]
            measured[number] = time
        if name in _ENDS:
            one.cause = "done" if name == "end" else str(row.get("reason", name))
    return [found[number] for number in sorted(found)]
