"""Records of a run: `metrics.jsonl`, one row per line, and `status.json`, its current state."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.config import WandbConfig
from megalite.files import append_line
from megalite.log import logger, redact, replace_nonfinite
from megalite.observe.console import Console
from megalite.observe.sinks import Sink, open_sink
from megalite.observe.status import METRICS, TAIL, State, write_status
from megalite.observe.tensorboard import TensorBoard
from megalite.observe.wandb import Wandb


@dataclass
class Recorder:
    """Writer of a run's reports: metrics.jsonl, status.json, the console and other sinks.

    Rank 0 writes; on other ranks every method does nothing. The recorder adds `kind`, `time` and
    `attempt` to rows. It writes non-finite numbers as null. config.json must exist already, because
    TensorBoard and W&B show it.
    """

    folder: Path
    rank: int
    attempt: int
    total_steps: int
    tensorboard: bool
    wandb: WandbConfig | None = None
    sinks: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._last_checkpoint: str | None = None
        self._warned = False
        self._writes = self.rank == 0
        self._views: list[Sink] = []
        self._plugins: list[Sink] = []
        self._hook = threading.excepthook
        if self.rank != 0:
            return
        threading.excepthook = self._thread_failed
        with self.tolerating_disk_errors():
            _end_last_line(self.folder / METRICS)
        self._views.append(Console(total_steps=self.total_steps))
        if self.tensorboard:
            self._views.append(TensorBoard(self.folder, attempt=self.attempt))
        if self.wandb is not None and self.wandb.mode != "disabled":
            self._views.append(Wandb(self.folder, self.wandb))
        for name in self.sinks:
            try:
                self._plugins.append(open_sink(name, self.folder, attempt=self.attempt))
            except Exception as error:  # third-party code: the run continues without it
                self._warn(error)
        self._views += self._plugins

    def train(self, row: Mapping[str, Any]) -> None:
        """Record a train row. `step` counts from 1; `tokens` is the total so far."""
        row = self._write("train", row)
        self._show(lambda view: view.train(row))

    def valid(self, row: Mapping[str, Any], *, tokens: int | None = None) -> None:
        """Record an evaluation on held-out data, after training on `tokens` tokens."""
        row = self._write("valid", row)
        self._show(lambda view: view.valid(row, tokens=tokens))

    def picture(self, name: str, image: Any, step: int) -> None:
        """Show an image, uint8 [H, W, 3], in the sinks that can."""
        self._show(lambda view: view.picture(name, image, step))

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Record prompts with the model's continuations. Secrets are redacted."""
        safe = [(redact(prompt), redact(text)) for prompt, text in texts]
        for prompt, text in safe:
            self._write("sample", {"step": step, "prompt": prompt, "text": text})
        if safe:
            self._show(lambda view: view.samples(step, safe))

    def event(self, step: int, name: str, **fields: Any) -> None:
        """Record an event, such as start, resume, checkpoint, skip, signal or end."""
        self._write("event", {"step": step, "name": name, **_without_secrets(fields)})
        self._show(lambda view: view.event(step, name))

    def append(self, name: str, step: int, **fields: Any) -> None:
        """Record an event from a rank other than 0, if rank 0 can no longer write."""
        row = {"kind": "event", "time": time.time(), "attempt": self.attempt, "step": step}
        line = replace_nonfinite({**row, "name": name, **_without_secrets(fields)})
        with suppress(OSError):
            append_line(self.folder / METRICS, json.dumps(line, allow_nan=False).encode())

    def status(
        self,
        state: State,
        *,
        step: int,
        last_checkpoint: str | None = None,
        reason: str | None = None,
    ) -> None:
        """Replace status.json. Without `last_checkpoint`, the previous one stays."""
        self._last_checkpoint = last_checkpoint or self._last_checkpoint
        if self._writes:
            with self.tolerating_disk_errors():
                write_status(
                    self.folder,
                    state,
                    step=step,
                    attempt=self.attempt,
                    last_checkpoint=self._last_checkpoint,
                    reason=reason,
                )

    def close(self) -> None:
        """Close all sinks. A second call does nothing."""
        self._show(lambda view: view.close())
        self._writes = False
        self._views = []
        if self.rank == 0:
            threading.excepthook = self._hook

    @contextmanager
    def tolerating_disk_errors(self) -> Iterator[None]:
        """Run a block that writes records. If the disk is full, warn once and drop the records."""
        try:
            yield
        except OSError as error:
            self._warn(error)

    def _write(self, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
        clean: dict[str, Any] = replace_nonfinite(row)
        if self._writes:
            line = {"kind": kind, "time": time.time(), "attempt": self.attempt, **clean}
            with self.tolerating_disk_errors():
                append_line(self.folder / METRICS, json.dumps(line, allow_nan=False).encode())
        return clean

    def _show(self, act: Callable[[Sink], None]) -> None:
        """Call every view. A view that raises an error is closed and not called again."""
        for view in list(self._views):
            try:
                act(view)
            except Exception as error:
                if not isinstance(error, OSError) and view not in self._plugins:
                    raise
                self._warn(error)
                if not isinstance(view, Console):
                    self._views.remove(view)
                    with suppress(Exception if view in self._plugins else OSError):
                        view.close()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning("%s cannot be written: %s; the run goes on", self.folder, error)
        self._warned = True

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Treat a write error in a view's thread like one in the main thread."""
        if isinstance(failure.exc_value, OSError):
            self._warn(failure.exc_value)
        else:
            self._hook(failure)


def _end_last_line(path: Path) -> None:
    """Add a newline to a complete last row; remove a row that a crash cut short.

    So every line of the file is a row.
    """
    with open(path, "ab+") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - TAIL))
        tail = file.read()
        rest = tail[tail.rfind(b"\n") + 1 :]
        if rest:
            try:
                json.loads(rest)
                file.write(b"\n")
            except (ValueError, RecursionError):
                file.truncate(end - len(rest))


def _without_secrets(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Redact the reason of an event. The run reads the other fields again."""
    return {**fields, "reason": redact(fields["reason"])} if "reason" in fields else {**fields}
