"""The run's own records: `metrics.jsonl`, a row a line, and `status.json`, its present state."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megalite.config import WandbConfig
from megalite.files import read_json, read_rows, write_json
from megalite.log import finite, logger, redact
from megalite.observe.console import Console
from megalite.observe.tensorboard import TensorBoard
from megalite.observe.wandb import Wandb

State = Literal["running", "saving", "stopped", "done", "failed", "superseded"]

_TAIL = 1 << 16  # bytes; hundreds of rows
_NOT_OURS = (ValueError, TypeError, KeyError, OverflowError)  # what other JSON raises


@dataclass
class Recorder:
    """Writes what a run reports: metrics.jsonl, status.json, TensorBoard, W&B and the console.

    Rank 0 writes; on every other rank each method does nothing. Rows come without `kind`, `time`
    and `attempt`, which are added here; numbers that are not finite become null. TensorBoard and
    W&B show the folder's config.json, so that file comes first.
    """

    folder: Path
    rank: int
    attempt: int
    total_steps: int
    tensorboard: bool
    wandb: WandbConfig | None = None

    def __post_init__(self) -> None:
        self._last_checkpoint: str | None = None
        self._complained = False
        self._file: BinaryIO | None = None
        self._views: list[Console | TensorBoard | Wandb] = []
        if self.rank != 0:
            return
        self._file = _open_lines(self.folder / "metrics.jsonl")
        self._views.append(Console(total_steps=self.total_steps))
        if self.tensorboard:
            self._views.append(TensorBoard(self.folder, attempt=self.attempt))
        if self.wandb is not None and self.wandb.mode != "disabled":
            self._views.append(Wandb(self.folder, self.wandb))

    def train(self, row: Mapping[str, Any]) -> None:
        """Record a train row; `step` counts from 1, `tokens` is the total so far."""
        row = self._write("train", row)
        for view in self._views:
            view.train(row)

    def valid(self, row: Mapping[str, Any], *, tokens: int | None = None) -> None:
        """Record an evaluation on held-out data, after so many tokens of training."""
        row = self._write("valid", row)
        for view in self._views:
            view.valid(row, tokens=tokens)

    def picture(self, name: str, image: Any, step: int) -> None:
        """Show an image, uint8 [H, W, 3], where there is a place for it."""
        for view in self._views:
            view.picture(name, image, step)

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Record prompts with the texts that the model wrote after them."""
        for prompt, text in texts:
            written = {"prompt": redact(prompt), "text": redact(text)}
            self._write("sample", {"step": step, **written})
        for view in self._views if texts else ():
            view.samples(step, texts)

    def event(self, step: int, name: str, **fields: Any) -> None:
        """Record that something happened: start, resume, checkpoint, skip, signal, end."""
        self._write("event", {"step": step, "name": name, **_without_secrets(fields)})
        for view in self._views:
            view.event(step, name)

    def append(self, name: str, step: int, **fields: Any) -> None:
        """Record an event from a rank that does not otherwise write, when rank 0 no longer can."""
        row = {"kind": "event", "time": time.time(), "attempt": self.attempt, "step": step}
        with suppress(OSError), open(self.folder / "metrics.jsonl", "ab") as file:
            told = {**row, "name": name, **_without_secrets(fields)}
            file.write(json.dumps(told).encode() + b"\n")

    def status(
        self,
        state: State,
        *,
        step: int,
        last_checkpoint: str | None = None,
        reason: str | None = None,
    ) -> None:
        """Replace status.json; without `last_checkpoint` the one named before stays."""
        self._last_checkpoint = last_checkpoint or self._last_checkpoint
        if self._file is not None:
            status = {
                "state": state,
                "step": step,
                "attempt": self.attempt,
                "last_checkpoint": self._last_checkpoint,
                "reason": redact(reason),
            }
            with self._without_space():
                if _stated_attempt(self.folder) <= self.attempt:  # no later start speaks by now
                    write_json(self.folder / "status.json", status)

    def close(self) -> None:
        """Close everything; again is harmless."""
        for view in self._views:
            view.close()
        if self._file is not None:
            with self._without_space():
                self._file.close()
        self._file, self._views = None, []

    def _write(self, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
        clean: dict[str, Any] = finite(row)
        if self._file is not None:
            line = {"kind": kind, "time": time.time(), "attempt": self.attempt, **clean}
            # one write a row, so that a reader never meets half of one
            with self._without_space():
                self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                self._file.flush()
        return clean

    @contextmanager
    def _without_space(self) -> Iterator[None]:
        """A full disk costs records, said once, and not the run."""
        try:
            yield
        except OSError as error:
            if not self._complained:
                logger.warning("%s cannot be written: %s; the run goes on", self.folder, error)
            self._complained = True


def previous_attempts(folder: Path) -> int:
    """How many attempts wrote to this run folder, which is the number of the next one.

    0 for a fresh folder. Both records are asked: a crash may have left either of them behind.
    """
    attempts = [_stated_attempt(folder)]
    with suppress(FileNotFoundError):
        for row in read_rows(folder / "metrics.jsonl", last=_TAIL):
            with suppress(*_NOT_OURS):
                attempts.append(int(row["attempt"]))
    return max(attempts) + 1


def _stated_attempt(folder: Path) -> int:
    """The attempt that status.json names; -1 where there is none, or not one of ours."""
    with suppress(OSError, *_NOT_OURS):
        return int(read_json(folder / "status.json")["attempt"])
    return -1


def restate(folder: Path, state: State, *, reason: str) -> None:
    """Say in status.json that a start failed before it could open the run folder."""
    with suppress(OSError, ValueError, TypeError):
        status = read_json(folder / "status.json")
        told = {"state": state, "reason": redact(reason)}
        write_json(folder / "status.json", {**status, **told})


def resumed_before(folder: Path, *, path: str, job: str) -> bool:
    """Whether a job has already gone on from the checkpoint at `path`, by the run's events."""
    with suppress(OSError):
        for row in read_rows(folder / "metrics.jsonl"):
            with suppress(*_NOT_OURS):
                same = row.get("job") == job and Path(row["path"]).resolve() == Path(path)
                if row["kind"] == "event" and row["name"] == "resume" and same:
                    return True
    return False


def _open_lines(path: Path) -> BinaryIO:
    """Open for appending at the start of a line.

    Of a last line without an end, a whole row gets its end, and a row that a crash cut short is
    dropped: every line of the file stays a row.
    """
    file = open(path, "ab+")  # noqa: SIM115 - the recorder closes it
    end = file.seek(0, 2)
    file.seek(max(0, end - _TAIL))
    tail = file.read()
    rest = tail[tail.rfind(b"\n") + 1 :]
    if rest:
        try:
            json.loads(rest)
            file.write(b"\n")
        except ValueError:
            file.truncate(end - len(rest))
    return file


def _without_secrets(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an event; a reason is text for people, the others are read again by the run."""
    return {**fields, "reason": redact(fields["reason"])} if "reason" in fields else {**fields}
