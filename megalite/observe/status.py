"""`status.json`, the present state of a run: its newest start has the last word."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from megalite.files import each_row, read_json, read_rows, replace_small
from megalite.log import redact

State = Literal["running", "saving", "stopped", "done", "failed", "superseded"]

STATUS, METRICS = "status.json", "metrics.jsonl"
TAIL = 1 << 16  # bytes; hundreds of rows
_NOT_OURS = (ValueError, TypeError, KeyError, OverflowError)  # what other JSON raises


def write_status(
    folder: Path,
    state: State,
    *,
    step: int,
    attempt: int,
    last_checkpoint: str | None,
    reason: str | None,
) -> None:
    """Replace status.json, unless a later start of the run has written it.

    While the run goes on, the file also names rank 0's host and process: a signal to that one
    process stops all ranks.

    Raises:
        OSError: it cannot be written.
    """
    if recorded_attempt(folder) > attempt:
        return
    status: dict[str, Any] = {
        "state": state,
        "step": step,
        "attempt": attempt,
        "last_checkpoint": last_checkpoint,
        "reason": redact(reason),
    }
    if state in ("running", "saving"):
        status |= {"host": socket.gethostname(), "pid": os.getpid()}
    replace_small(folder / STATUS, json.dumps(status, indent=2, allow_nan=False) + "\n")


def overwrite_status(folder: Path, state: State, *, reason: str, attempt: int) -> None:
    """Write the end of a start whose recorder does not: it has none yet, or it hangs.

    Args:
        attempt: the number of that start. A later one's status stays.
    """
    before: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        found = read_json(folder / STATUS)
        before = found if isinstance(found, dict) else {}
    step, last = before.get("step"), before.get("last_checkpoint")
    with suppress(OSError, ValueError, TypeError):
        write_status(
            folder,
            state,
            step=step if isinstance(step, int) else 0,
            attempt=attempt,
            last_checkpoint=last if isinstance(last, str) else None,
            reason=reason,
        )


def recorded_attempt(folder: Path) -> int:
    """Return the attempt that status.json names; -1 if there is none, or not one of ours."""
    with suppress(OSError, *_NOT_OURS):
        return int(read_json(folder / STATUS)["attempt"])
    return -1


def previous_attempts(folder: Path) -> int:
    """Return how many attempts wrote to this run folder, which is the number of the next one.

    0 for a fresh folder. Both records are asked: a crash may have left either of them behind.
    """
    attempts = [recorded_attempt(folder)]
    with suppress(FileNotFoundError):
        for row in read_rows(folder / METRICS, last=TAIL):
            with suppress(*_NOT_OURS):
                attempts.append(int(row["attempt"]))
    return max(attempts) + 1


def has_resumed(folder: Path, *, path: str, job: str) -> bool:
    """Return whether a job has already gone on from the checkpoint at `path`."""
    return any(
        row.get("job") == job and Path(row["path"]).resolve() == Path(path)
        for row in _starts(folder)
        if row["name"] == "resume" and isinstance(row.get("path"), str)
    )


def started_from(folder: Path, name: Literal["start", "resume"], path: Path | None = None) -> bool:
    """Return whether a start of the run began from weights (start), or went on from `path`.

    Args:
        name: "start" requires `--init-from`, "resume" for `--resume PATH`.
        path: a step or run folder; None accepts any.
    """
    key = "init_from" if name == "start" else "path"
    for row in _starts(folder):
        if row["name"] == name and isinstance(found := row.get(key), str):
            resolved = Path(found).resolve()
            if path is None or path == resolved or path in resolved.parents:
                return True
    return False


def last_layout(folder: Path) -> dict[str, Any]:
    """Return the layout that the run's last start recorded, by key; empty if it recorded none."""
    rows = _starts(folder)
    layout = rows[-1].get("layout") if rows else None
    return layout if isinstance(layout, dict) else {}


def _starts(folder: Path) -> list[dict[str, Any]]:
    """Return the events that began or resumed the run, in order."""
    found = []
    with suppress(OSError):
        for row in each_row(folder / METRICS):
            if row is None or row.get("kind") != "event":
                continue
            if row.get("name") in ("start", "resume"):
                found.append(row)
    return found
