"""`status.json`, the current state of a run, written by its newest attempt."""

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
_INVALID = (ValueError, TypeError, KeyError, OverflowError)  # raised by other JSON


def write_status(
    folder: Path,
    state: State,
    *,
    step: int,
    attempt: int,
    last_checkpoint: str | None,
    reason: str | None,
) -> None:
    """Replace status.json, unless a later attempt of the run has written it.

    While the run goes on, the file also contains rank 0's host and process id: a signal to that
    process stops all ranks.

    Raises:
        OSError: the file cannot be written.
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
    """Write the end of an attempt whose recorder cannot: it does not exist yet, or it hangs.

    Args:
        attempt: number of that attempt. The status of a later attempt stays.
    """
    previous: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        status = read_json(folder / STATUS)
        previous = status if isinstance(status, dict) else {}
    step, last = previous.get("step"), previous.get("last_checkpoint")
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
    """Return the attempt in status.json; -1 if the file is missing or invalid."""
    with suppress(OSError, *_INVALID):
        return int(read_json(folder / STATUS)["attempt"])
    return -1


def previous_attempts(folder: Path) -> int:
    """Return the number of attempts that wrote to a run folder: the number of the next attempt.

    A fresh folder has 0. Both records are read, because a crash may leave either one outdated.
    """
    attempts = [recorded_attempt(folder)]
    with suppress(FileNotFoundError):
        for row in read_rows(folder / METRICS, last=TAIL):
            with suppress(*_INVALID):
                attempts.append(int(row["attempt"]))
    return max(attempts) + 1


def has_resumed(folder: Path, *, path: str, job: str) -> bool:
    """Return whether a job has already resumed from the checkpoint at `path`."""
    return any(
        row.get("job") == job and Path(row["path"]).resolve() == Path(path)
        for row in _starts(folder)
        if row["name"] == "resume" and isinstance(row.get("path"), str)
    )


def started_from(folder: Path, name: Literal["start", "resume"], path: Path | None = None) -> bool:
    """Return whether an attempt of the run started or resumed from a given checkpoint.

    Args:
        name: "start" for `--init-from`, "resume" for `--resume PATH`.
        path: a step folder or a run folder. None accepts any.
    """
    key = "init_from" if name == "start" else "path"
    for row in _starts(folder):
        if row["name"] == name and isinstance(recorded := row.get(key), str):
            resolved = Path(recorded).resolve()
            if path is None or path == resolved or path in resolved.parents:
                return True
    return False


def last_layout(folder: Path) -> dict[str, Any]:
    """Return the layout that the last attempt recorded, by key. Empty if there is none."""
    rows = _starts(folder)
    layout = rows[-1].get("layout") if rows else None
    return layout if isinstance(layout, dict) else {}


def _starts(folder: Path) -> list[dict[str, Any]]:
    """Return the start and resume events of the run, in order."""
    events = []
    with suppress(OSError):
        for row in each_row(folder / METRICS):
            if row is None or row.get("kind") != "event":
                continue
            if row.get("name") in ("start", "resume"):
                events.append(row)
    return events
