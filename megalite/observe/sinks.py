"""Sinks of a run's rows: the console, TensorBoard, W&B and those of other packages.

A package's sink is an entry point `sink.NAME`. Its object is called with the run folder and the
attempt, and returns a `Sink`. A run file lists its name in `logging.sinks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megalite import registry


class Sink(Protocol):
    """Receiver of a run's rows on rank 0. Numbers in rows are finite or None."""

    def train(self, row: Mapping[str, Any]) -> None:
        """Show a train row, with the keys of metrics.jsonl."""

    def valid(self, row: Mapping[str, Any], *, tokens: int | None) -> None:
        """Show an evaluation, made after training on `tokens` tokens."""

    def picture(self, name: str, image: Any, step: int) -> None:
        """Show an image, uint8 [H, W, 3]."""

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Show prompts with the model's continuations."""

    def event(self, step: int, name: str) -> None:
        """Show an event."""

    def close(self) -> None:
        """Flush buffers. No other call follows."""


def open_sink(name: str, folder: Path, *, attempt: int) -> Sink:
    """Open a sink by its name.

    Args:
        attempt: number of earlier starts of this run.
    Raises:
        UserError: the name is unknown, or its package cannot be imported.
    """
    sink: Sink = registry.sinks.load(name)(folder, attempt=attempt)
    return sink
