"""Goodput: how a run spent its time (training, other work, restarts), from its records."""

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

_SET_BACK = 60.0  # seconds; the clocks of two hosts may differ by less
_ENDS = ("end", "stopped", "failed", "superseded", "hang")


@dataclass
class Attempt:
    """One attempt (start) of a run.

    Attributes:
        first: step from which it resumed.
        last: last step that it recorded.
        seconds: seconds in each phase ("setup", "step", "eval", "save", ...).
        down: seconds between the end of the previous attempt and its own beginning.
        redone: steps that a rollback discarded.
        lost: those, and the steps that the next attempt repeated.
        cause: how it ended.
    """

    attempt: int
    first: int
    last: int
    seconds: dict[str, float]
    down: float = 0.0
    redone: int = 0
    lost: int = 0
    cause: str = "killed, or its host failed: it recorded no end"
    began: float = field(default=0.0, repr=False)
    ended: float = field(default=0.0, repr=False)


def goodput(run: Path) -> dict[str, Any]:
    """Return how a run spent its time.

    Returns:
        {run, state, attempts, lost_steps, restarts, wall_seconds, seconds, goodput,
        clock_set_back_seconds}. `seconds` sums the phases of all attempts; "lost" is repeated work
        and "down" the time between attempts. `goodput` is the share of the wall time spent in steps
        that were not lost. If the clock was set back, time continues from the latest row.
    Raises:
        CommandError: the folder has no records of a run.
    """
    try:
        rows = [row for row in each_row(run / "metrics.jsonl") if row is not None]
        set_back, rows = _without_set_backs(rows)
        return _account(run, _attempts(rows)) | {"clock_set_back_seconds": set_back}
    except OSError as error:
        raise CommandError(
            f"{run}: cannot read metrics.jsonl: {error.strerror}; give a run folder"
        ) from None
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CommandError(
            f"{run}/metrics.jsonl is damaged: {type(error).__name__}: {error}"
        ) from None


def _account(run: Path, attempts: list[Attempt]) -> dict[str, Any]:
    if not attempts:
        raise CommandError(f"{run}: metrics.jsonl records no start; give a run folder")
    attempts[-1].lost = attempts[-1].redone
    for before, after in pairwise(attempts):
        before.lost = before.redone + max(0, before.last - after.first)
        after.down = max(0.0, after.began - after.seconds.get("setup", 0.0) - before.ended)
    state = "unknown"
    with suppress(OSError, ValueError, KeyError, TypeError):
        state = read_json(run / "status.json")["state"]
    if state in ("running", "saving"):
        attempts[-1].cause = "running, or killed"
    totals: dict[str, float] = {}
    for one in attempts:
        taken = one.last - one.first + one.redone
        lost = one.seconds.get("step", 0.0) * one.lost / max(1, taken)
        parts = {**one.seconds, "lost": lost, "down": one.down}
        parts["step"] = one.seconds.get("step", 0.0) - lost
        for name, seconds in parts.items():
            totals[name] = totals.get(name, 0.0) + seconds
    wall = attempts[-1].ended - attempts[0].began + attempts[0].seconds.get("setup", 0.0)
    rows = [{k: v for k, v in asdict(a).items() if k not in ("began", "ended")} for a in attempts]
    return {
        "run": str(run),
        "state": state,
        "attempts": rows,
        "lost_steps": sum(one.lost for one in attempts),
        "restarts": len(attempts) - 1,
        "wall_seconds": wall,
        "seconds": totals,
        "goodput": totals.get("step", 0.0) / wall if wall else 0.0,
    }


def _without_set_backs(rows: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """Shift rows so that time never goes back by more than a minute.

    Returns:
        the total shift in seconds, and the rows.
    """
    shifted = list[dict[str, Any]]()
    latest = -math.inf
    shift = 0.0
    for row in rows:
        if not {"kind", "time", "attempt", "step"} <= {*row}:
            continue
        if not all(_is_number(row[key]) for key in ("time", "attempt", "step")):
            raise ValueError(f"time, attempt or step is not a number in {row!s:.80}")
        if row["time"] + shift < latest - _SET_BACK:
            shift = latest - row["time"]
        latest = max(latest, row["time"] + shift)
        shifted.append({**row, "time": row["time"] + shift})
    return shift, shifted


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15


def _attempts(rows: Iterable[dict[str, Any]]) -> list[Attempt]:
    attempts: dict[int, Attempt] = {}
    measured: dict[int, float] = {}  # time up to which the seconds of an attempt are counted
    for row in rows:
        number, time = row["attempt"], row["time"]
        name = row.get("name")
        if name in ("start", "resume"):
            attempts[number] = Attempt(number, row["step"], row["step"], {}, began=time)
            measured[number] = time
        if (one := attempts.get(number)) is None:
            continue
        one.ended = time
        one.last = max(one.last, row["step"])
        if name == "rollback":
            one.redone += row["step"] - 1 - row["to"]
        # a straggler's seconds are those of one forward pass
        if name != "straggler" and (seconds := row.get("seconds")):
            if not all(map(_is_number, seconds.values())):
                raise ValueError(f"seconds are not numbers in {row!s:.80}")
            one.seconds = {part: float(value) for part, value in seconds.items()}
            measured[number] = time
        elif row["kind"] == "train":  # counts if the attempt is killed later
            one.seconds["step"] = one.seconds.get("step", 0.0) + time - measured[number]
            measured[number] = time
        if name in _ENDS:
            one.cause = "done" if name == "end" else str(row.get("reason", name))
    return [attempts[number] for number in sorted(attempts)]
