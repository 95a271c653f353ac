"""Scalars, samples of text, pictures and the run file for TensorBoard."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.observe.console import interval_loss

_TRAIN = (
    *("loss", "lr", "grad_norm", "mfu", "step_seconds"),
    *("tokens_per_second", "tokens_per_second_per_device"),
)
_GIB = 2**30


def train_scalars(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of a train row by TensorBoard tag."""
    values = {f"train/{key}": row.get(key) for key in _TRAIN}
    values["train/loss"] = interval_loss(row)
    if row.get("peak_memory_bytes") is not None:
        values["train/peak_memory_gib"] = row["peak_memory_bytes"] / _GIB
    return values


def valid_scalars(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of a valid row by TensorBoard tag."""
    return {
        f"valid/{key}": value
        for key, value in row.items()
        if key not in ("step", "best_step", "epoch") and isinstance(value, int | float)
    }


class TensorBoard:
    """Sink with two event folders: `tensorboard/` by step, `tensorboard/by_tokens/` by tokens.

    Tags differ, because a chart has one axis. Folders differ, because a resumed attempt removes
    what a crashed one wrote after the checkpoint. TensorBoard purges all tags of a folder from one
    point of its axis.
    """

    def __init__(self, folder: Path, *, attempt: int) -> None:
        # imported only if events are written: it takes 0.2 s, and warns without tensorboard
        from torch.utils.tensorboard import SummaryWriter

        self._writer_class = SummaryWriter
        self._folder, self._attempt = folder, attempt
        self._writers: dict[str, Any] = {}

    def train(self, row: Mapping[str, Any]) -> None:
        """Write a train row."""
        self._scalars(".", int(row["step"]), train_scalars(row))
        self._by_tokens("train", row.get("tokens"), interval_loss(row))

    def picture(self, name: str, image: Any, step: int) -> None:
        """Write an image, uint8 [H, W, 3]."""
        self._writer(".", step).add_image(name, image, step, dataformats="HWC")

    def valid(self, row: Mapping[str, Any], *, tokens: int | None) -> None:
        """Write a valid row. Its loss is drawn by tokens as well, if `tokens` is given."""
        self._scalars(".", int(row["step"]), valid_scalars(row))
        self._by_tokens("valid", tokens, row.get("loss"))
        for writer in self._writers.values():
            writer.flush()

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Write prompts with the model's continuations."""
        shown = [
            f"**prompt**\n\n{_block(prompt)}\n\n**text**\n\n{_block(text)}\n\n"
            for prompt, text in texts
        ]
        writer = self._writer(".", step)
        writer.add_text("samples", "---\n\n".join(shown), step)
        writer.flush()

    def event(self, step: int, name: str) -> None:
        """Ignore the event."""

    def close(self) -> None:
        """Flush and close the event files."""
        for writer in self._writers.values():
            writer.close()

    def _by_tokens(self, kind: str, tokens: int | None, loss: float | None) -> None:
        if tokens is not None:
            self._scalars("by_tokens", tokens, {f"{kind}/loss_by_tokens": loss})

    def _scalars(self, name: str, at: int, values: Mapping[str, float | None]) -> None:
        writer = self._writer(name, at)
        for tag, value in values.items():
            if value is not None and math.isfinite(value):
                writer.add_scalar(tag, value, at)

    def _writer(self, name: str, at: int) -> Any:
        if name not in self._writers:
            purge = at if self._attempt > 0 else None
            folder = str(self._folder / "tensorboard" / name)
            self._writers[name] = self._writer_class(folder, purge_step=purge, flush_secs=10)
            run_file = self._folder / "config.json"
            if name == "." and run_file.exists():
                text = run_file.read_text(encoding="utf-8")
                self._writers[name].add_text("config", _block(text), 0)  # step 0
        return self._writers[name]


def _block(text: str) -> str:
    """Indent a text by four: Markdown's code block."""
    return textwrap.indent(text, "    ").rstrip()
