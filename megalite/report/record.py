"""Content of a run folder, also after a crash or on a full disk."""

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
_LARGEST = 1e30  # what is above measures nothing, and cannot be drawn
_SUREST = 5  # mistakes that are shown
_NOT_OURS = (AttributeError, KeyError, TypeError, ValueError, IndexError, ArithmeticError)


def number(value: Any) -> float:
    """Return a JSON value as a number; NaN if it cannot be drawn."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if real and -_LARGEST < value < _LARGEST else math.nan


class Track:
    """Numbers by step, ascending, in 8 bytes each; NaN where a row had none."""

    def __init__(self, *names: str) -> None:
        self.steps = array("d")
        self.columns = {name: array("d") for name in names}

    def add(self, step: float, row: Mapping[str, Any]) -> int:
        """Take a row in place of those that are not before it; returns how many these were."""
        follows = not self.steps or step > self.steps[-1]
        gone = 0 if follows else self._keep(bisect_left(self.steps, step))
        self.steps.append(step)
        for name, column in self.columns.items():
            column.append(number(row.get(name)))
        return gone

    def go_back(self, step: float) -> int:
        """Forget what came after a step; returns how many rows that were."""
        return self._keep(bisect_right(self.steps, step))

    def _keep(self, count: int) -> int:
        gone = len(self.steps) - count
        for column in (self.steps, *self.columns.values()):
            del column[count:]
        return gone


@dataclass
class Record:
    """A run, read from its folder.

    Attributes:
        config: the values of config.json as JSON texts, by dotted key; empty if it is missing.
        status, plan, evaluation: what the files of these names hold; empty if they are missing.
        time: what `goodput` says; empty where it cannot.
        epochs: valid rows of fine-tuning.
        spans: first and last time of each attempt's rows, Unix seconds.
        predictions, wrong: how many there are of examples with labels, and how many are mistakes.
        mistakes: the surest ones: probability, id, label, prediction.
        notes: what is missing, broken or out of the ordinary, a sentence each.
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
        """Note what cannot be read or is not what a run writes, and go on without it."""
        try:
            yield
        except OSError as error:
            self.note(f"{name} cannot be read: {error.strerror}.")
        except (*_NOT_OURS, CommandError, RecursionError) as error:
            self.note(f"{name} is not as a run writes it: {type(error).__name__}: {error}.")

    def note(self, sentence: str) -> None:
        """Say something about the run, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def take(self, row: dict[str, Any] | None) -> None:
        """Take the next row of metrics.jsonl; of a step that was taken again the later counts."""
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
            if "best_step" not in row:  # which is of other weights than the step's
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
        """Say what is out of the ordinary about the rows."""
        losses = self.train.columns["loss"]
        steps = self.train.steps
        missing = [step for step, loss in zip(steps, losses, strict=True) if math.isnan(loss)]
        if self._broken:
            self.note(
                f"Lines of {_ROWS} that are no rows, such as a crash cuts short, and are omitted: "
                f"{self._broken:,}."
            )
        if not steps:
            self.note("It has recorded no step of training yet.")
        if missing:
            self.note(
                f"Rows without a finite loss: {len(missing):,} of {len(steps):,}, the first at "
                f"step {missing[0]:,.0f}. They are marked × in the chart."
            )
        if self._replaced:
            self.note(
                "Rows that are not drawn, as the run went back before them and what came later "
                f"counts: {self._replaced:,}."
            )


def read_records(folders: Sequence[Path]) -> list[Record]:
    """Read run folders.

    Raises:
        CommandError: some are none, all of them at once.
    """
    if faults := [fault for folder in folders if (fault := _fault(folder))]:
        raise CommandError("\n".join(faults))
    return [_read_record(folder) for folder in folders]


def _fault(folder: Path) -> str | None:
    try:
        if any((folder / name).exists() for name in (_ROWS, _STATUS)):
            return None
        found = f"neither {_ROWS} nor {_STATUS} is in it" if folder.is_dir() else "no such folder"
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{_ROWS}"))[:2]
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}; give runs, such as runs/smoke"
    return f"{folder} is no run: {found}; give runs, such as {', '.join(inside) or 'runs/smoke'}"


def _read_record(folder: Path) -> Record:
    record = Record(folder)
    with record.noting_errors("config.json"):
        config = {**read_json(folder / "config.json")}
        rename_keys(config)  # so that runs of an earlier version compare with later ones
        record.config = dict(_flat(config))
    record.status = _object(record, _STATUS, asked=True)
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


def _object(record: Record, name: str, *, asked: bool = False) -> dict[str, Any]:
    if asked or (record.folder / name).exists():
        with record.noting_errors(name):
            found = read_json(record.folder / name)
            return {**found}
    return {}


def _read_predictions(record: Record) -> None:
    for row in each_row(record.folder / "predictions.jsonl"):
        if row is None or row["label"] is None:
            continue
        record.predictions += 1
        if row["label"] != row["prediction"]:
            record.wrong += 1
            sure = max(map(number, row["probabilities"]))
            if math.isnan(sure):
                raise ValueError(f"probabilities {row['probabilities']!s:.40}")
            told = (sure, str(row["id"]), str(row["label"]), str(row["prediction"]))
            record.mistakes = sorted([*record.mistakes, told], reverse=True)[:_SUREST]


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
