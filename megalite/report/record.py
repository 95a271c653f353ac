"""Reader of run folders, which copes with crashes and damaged files."""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.config import rename_keys
from megalite.errors import CommandError
from megalite.files import each_row, read_json
from megalite.observe.console import interval_loss
from megalite.observe.goodput import goodput

_ROWS, _STATUS = "metrics.jsonl", "status.json"
_TRAIN = ("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "peak_memory_bytes")
_VALID = ("loss", "accuracy", "f1")
_LARGEST = 1e30  # larger values are not drawn
_SHOWN_MISTAKES = 5
_INVALID = (AttributeError, KeyError, TypeError, ValueError, IndexError, ArithmeticError)


def number(value: Any) -> float:
    """Return a JSON value as a number. NaN if it cannot be drawn."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if real and -_LARGEST < value < _LARGEST else math.nan


class Track:
    """Columns of numbers by ascending step. Missing numbers are NaN."""

    def __init__(self, *names: str) -> None:
        self.steps = array("d")
        self.columns = {name: array("d") for name in names}

    def add(self, step: float, row: Mapping[str, Any]) -> int:
        """Add a row. Drop rows of this and later steps, and return how many there were."""
        follows = not self.steps or step > self.steps[-1]
        dropped = 0 if follows else self._truncate(bisect_left(self.steps, step))
        self.steps.append(step)
        for name, column in self.columns.items():
            column.append(number(row.get(name)))
        return dropped

    def go_back(self, step: float) -> int:
        """Drop the rows after a step. Return how many there were."""
        return self._truncate(bisect_right(self.steps, step))

    def _truncate(self, count: int) -> int:
        dropped = len(self.steps) - count
        for column in (self.steps, *self.columns.values()):
            del column[count:]
        return dropped


@dataclass
class Record:
    """Records of a run, read from its folder.

    Attributes:
        config: values of config.json as JSON, by dotted key. Empty if the file is missing.
        status, plan, evaluation: content of these JSON files. Empty if they are missing.
        time: result of `goodput`. Empty if that fails.
        epochs: valid rows of fine-tuning.
        spans: first and last time of each attempt's rows, in Unix seconds.
        predictions: number of predictions for labeled examples.
        wrong: number of wrong predictions.
        mistakes: the most confident ones, as (probability, id, label, prediction).
        notes: sentences about missing, damaged or unusual records.
    """

    folder: Path
    config: dict[str, str] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    time: dict[str, Any] = field(default_factory=dict)
    train: Track = field(default_factory=lambda: Track(*_TRAIN))
    valid: Track = field(default_factory=lambda: Track(*_VALID))
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    spans: dict[float, tuple[float, float]] = field(default_factory=dict)
    predictions: int = 0
    wrong: int = 0
    mistakes: list[tuple[float, str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _broken: int = 0
    _replaced: int = 0

    @contextmanager
    def noting_errors(self, name: str) -> Iterator[None]:
        """Run a block that reads a file. On an error, add a note and go on."""
        try:
            yield
        except OSError as error:
            self.note(f"{name} cannot be read: {error.strerror}.")
        except (*_INVALID, CommandError, RecursionError) as error:
            self.note(f"{name} is damaged: {type(error).__name__}: {error}.")

    def note(self, sentence: str) -> None:
        """Add a note, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def take(self, row: dict[str, Any] | None) -> None:
        """Add the next row of metrics.jsonl. If a step was repeated, the later row counts."""
        step = number(row.get("step")) if row else math.nan
        if row is None or math.isnan(step):
            self._broken += 1
            return
        time, attempt = number(row.get("time")), number(row.get("attempt"))
        if not math.isnan(time + attempt):
            first, last = self.spans.get(attempt, (time, time))
            self.spans[attempt] = min(first, time), max(last, time)
        if row.get("kind") == "train":
            shown = row | {"loss": interval_loss(row)}
            self._replaced += self.train.add(step, shown)
        elif row.get("kind") == "sample":
            self.samples.append(row)
        elif row.get("kind") == "valid":
            if "best_step" not in row:  # else measured with the weights of another step
                self.valid.add(step, row)
            if "epoch" in row or "best_step" in row:
                self.epochs.append(row)
        elif row.get("kind") == "event":
            self.events.append(row)
            name = row.get("name")
            if name in ("start", "resume", "rollback"):
                self._go_back(number(row.get("to")) if name == "rollback" else step)

    def _go_back(self, step: float) -> None:
        if not math.isnan(step):
            self._replaced += self.train.go_back(step)
            self.valid.go_back(step)
            self.samples = [row for row in self.samples if row["step"] <= step]
            self.epochs = [row for row in self.epochs if row["step"] <= step]

    def note_oddities(self) -> None:
        """Add notes about unusual rows."""
        losses = self.train.columns["loss"]
        steps = self.train.steps
        missing = [step for step, loss in zip(steps, losses, strict=True) if math.isnan(loss)]
        if self._broken:
            self.note(
                f"Omitted damaged lines of {_ROWS}, such as those cut short by a crash: "
                f"{self._broken:,}."
            )
        if not steps:
            self.note("The run has recorded no training step yet.")
        if missing:
            self.note(
                f"Rows without a finite loss: {len(missing):,} of {len(steps):,}, the first at "
                f"step {missing[0]:,.0f}. They are marked × in the chart."
            )
        if self._replaced:
            self.note(
                "Omitted rows of steps that the run repeated after a crash or rollback: "
                f"{self._replaced:,}."
            )


def read_records(folders: Sequence[Path]) -> list[Record]:
    """Read run folders.

    Raises:
        CommandError: some folders are not run folders. The message lists all of them.
    """
    if faults := [fault for folder in folders if (fault := _fault(folder))]:
        raise CommandError("\n".join(faults))
    return [_read_record(folder) for folder in folders]


def _fault(folder: Path) -> str | None:
    try:
        if any((folder / name).exists() for name in (_ROWS, _STATUS)):
            return None
        reason = f"it contains no {_ROWS} or {_STATUS}" if folder.is_dir() else "no such folder"
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{_ROWS}"))[:2]
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}; give run folders, such as runs/smoke"
    example = ", ".join(inside) or "runs/smoke"
    return f"{folder} is not a run folder: {reason}; give run folders, such as {example}"


def _read_record(folder: Path) -> Record:
    record = Record(folder)
    with record.noting_errors("config.json"):
        config = {**read_json(folder / "config.json")}
        rename_keys(config)  # so that runs of earlier versions are comparable
        record.config = dict(_flat(config))
    record.status = _object(record, _STATUS, required=True)
    record.plan = _object(record, "plan.json")
    record.evaluation = _object(record, "evaluation.json")
    with record.noting_errors(_ROWS):
        for row in each_row(folder / _ROWS):
            record.take(row)
        record.note_oddities()
    if record.events:
        with record.noting_errors(_ROWS):
            record.time = goodput(folder)
            if (back := record.time["clock_set_back_seconds"]) > 0:
                record.note(f"The clock was set back by {back:,.0f} s during the run.")
    if (folder / "predictions.jsonl").exists():
        with record.noting_errors("predictions.jsonl"):
            _read_predictions(record)
    return record


def _object(record: Record, name: str, *, required: bool = False) -> dict[str, Any]:
    if required or (record.folder / name).exists():
        with record.noting_errors(name):
            content = read_json(record.folder / name)
            return {**content}
    return {}


def _read_predictions(record: Record) -> None:
    for row in each_row(record.folder / "predictions.jsonl"):
        if row is None or row["label"] is None:
            continue
        record.predictions += 1
        if row["label"] != row["prediction"]:
            record.wrong += 1
            confidence = max(map(number, row["probabilities"]))
            if math.isnan(confidence):
                raise ValueError(f"probabilities {row['probabilities']!s:.40}")
            mistake = (confidence, str(row["id"]), str(row["label"]), str(row["prediction"]))
            mistakes = sorted([*record.mistakes, mistake], reverse=True)
            record.mistakes = mistakes[:_SHOWN_MISTAKES]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    parts: Any = None
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        parts = enumerate(value)
    if parts is None:
        yield key, json.dumps(value, ensure_ascii=False)
    else:
        for name, item in parts:
            yield from _flat(item, f"{key}.{name}" if key else str(name))
