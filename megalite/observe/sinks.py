"""Sinks of a run's rows: the console, TensorBoard, W&B and those of packages.

A package's sink is an entry point `sink.NAME` whose object is called with the run folder and the
attempt, and returns a `Sink`. A run file names it in `logging.sinks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megalite import registry


class Sink(Protocol):
    """Receiver of a run's rows, on rank 0. Rows hold finite numbers or None."""

    def train(self, row: Mapping[str, Any]) -> None:
        """Show a train row, with the keys of metrics.jsonl."""

    def valid(self, row: Mapping[str, Any], *, tokens: int | None) -> None:
        """Show an evaluation, made after so many tokens of training."""

    def picture(self, name: str, image: Any, step: int) -> None:
        """Show an image, uint8 [H, W, 3]."""

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Show prompts, each with the text that the model wrote after it."""

    def event(self, step: int, name: str) -> None:
        """Show that something happened."""

    def close(self) -> None:
        """Write out what is buffered; no other call follows."""


def open_sink(name: str, folder: Path, *, attempt: int) -> Sink:
    """Open a sink by its name.

    Args:
        attempt: starts of this run before this one.
    Raises:
        UserError: an unknown name, or a package that cannot be imported.
    """
    sink: Sink = registry.sinks.load(name)(folder, attempt=attempt)
    return sink
