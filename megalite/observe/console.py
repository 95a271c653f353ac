"""Console output of a run: a live view on a terminal, aligned log lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megalite.log import logger

_BAR = 40  # columns of the bar at most; a bar under a quarter of them is not drawn
_SAMPLE = 160  # columns of a sample in a log


class Console:
    """Sink that shows a run's rows on standard error."""

    def __init__(self, *, total_steps: int) -> None:
        self._total = total_steps
        self._first: tuple[int, float] | None = None  # step and clock of the first row
        self._saved: int | None = None
        self._live: Live | None = None
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []  # with original stream
        console = RichConsole(stderr=True)
        # if FORCE_COLOR is set, rich takes any stream for a terminal
        if sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
            self._start_live(console)

    def train(self, row: Mapping[str, Any]) -> None:
        """Show a train row. On a terminal it replaces the previous one."""
        step = int(row["step"])
        left = f"left {format_duration(self._seconds_left(step, row.get('step_seconds')))}"
        progress, *numbers = train_parts(row, total_steps=self._total)
        if self._live is None:
            logger.info("%s  %s", "  ".join([progress, *numbers]), left)
            return
        head = [progress, f"{100 * step / self._total:3.0f} %", left]
        if self._saved is not None:
            head.append(f"saved at step {self._saved}")
        self._live.update(_View(step / self._total, head, numbers), refresh=True)

    def picture(self, name: str, image: Any, step: int) -> None:
        """Ignore the image."""

    def valid(self, row: Mapping[str, Any], *, tokens: int | None = None) -> None:
        """Log a valid row as a line that begins with its split."""
        numbers = [
            f"{key} {_measurement(value)}"
            for key, value in row.items()
            if key != "step" and (value is None or isinstance(value, int | float))
        ]
        split = "test" if row.get("split") == "test" else "valid"
        step = f"{row['step']:{len(str(self._total))}}"
        logger.info("%s %s  %s", split, step, "  ".join(numbers))

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Log the beginnings of each prompt and its continuation on one line."""
        room = _SAMPLE if self._live is None else self._live.console.width
        for prompt, text in texts:
            begin = f"sample {step:{len(str(self._total))}}  {_line(prompt, room // 4)} -> "
            logger.info("%s%s", begin, _line(text, room - len(begin)))

    def event(self, step: int, name: str) -> None:
        """Remember the last checkpoint, for the live view."""
        if name == "checkpoint":
            self._saved = step

    def close(self) -> None:
        """Leave the last view on the screen and release the terminal."""
        if self._live is not None:
            for handler, stream in self._redirected:
                handler.setStream(stream)
            self._live.stop()
            self._live = None

    def _start_live(self, console: RichConsole) -> None:
        """Draw the view at the bottom. Log lines on standard error scroll above it.

        The cursor stays visible, because a killed process could not restore it.
        """
        original = sys.stderr
        # a library's prints reach the same terminal if standard output is one
        self._live = Live(
            Text(""), console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()
        )
        self._live.start()
        console.show_cursor()
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is original:
                handler.setStream(sys.stderr)  # rich's proxy by now
                self._redirected.append((handler, original))

    def _seconds_left(self, step: int, step_seconds: float | None) -> float | None:
        """Return the seconds left, at the pace since the first row.

        The pace includes evaluations and saves.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step > first_step:
            step_seconds = (now - first_time) / (step - first_step)
        return None if step_seconds is None else (self._total - step) * step_seconds


class _View:
    """Live view: a progress bar and the numbers below, no wider than the terminal."""

    def __init__(self, share: float, head: Sequence[str], numbers: Sequence[str]) -> None:
        self._share, self._head, self._numbers = share, head, numbers

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        first, *others = [*_lines(self._head, width), *_lines(self._numbers, width)]
        room = min(_BAR, width - len(first) - 2)
        if room >= _BAR // 4:
            bar = Table.grid(padding=(0, 2))
            done = ProgressBar(total=1.0, completed=self._share, width=room, complete_style="cyan")
            bar.add_row(done, first)
            yield bar
        else:
            others = [first, *others]
        for line in others:
            yield Text(line, no_wrap=True, overflow="ellipsis")


def _lines(parts: Sequence[str], width: int) -> list[str]:
    """Join parts into lines of at most `width` columns."""
    lines = list(parts[:1])
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def interval_loss(row: Mapping[str, Any]) -> float | None:
    """Return the loss to show for a train row: the mean over the steps since the previous row.

    One step's loss varies with its batch. Rows of MegaLite 0.1 have only the loss of one step.
    """
    return row.get("mean_loss", row.get("loss"))


def train_parts(row: Mapping[str, Any], *, total_steps: int) -> list[str]:
    """Format a train row as parts whose widths do not change from step to step."""
    width = len(str(total_steps))
    parts = [
        f"step {row['step']:>{width}}/{total_steps}",
        f"loss {_number(interval_loss(row), '7.4f')}",
        f"lr {_number(row.get('lr'), '.2e')}",
        f"grad norm {_number(row.get('grad_norm'), '7.3f')}",
        f"{_number(row.get('tokens_per_second'), '9,.0f')} tokens/s",
    ]
    each = row.get("tokens_per_second_per_device")
    if each is not None and each != row.get("tokens_per_second"):  # several devices
        parts[-1] += f", {each:,.0f} per device"
    if row.get("mfu") is not None:
        parts.append(f"mfu {100 * row['mfu']:4.1f} %")
    if row.get("peak_memory_bytes") is not None:
        parts.append(f"{row['peak_memory_bytes'] / 2**30:6.2f} GiB")
    return parts


def format_duration(seconds: float | None) -> str:
    """Format a duration, such as `3:25`, `2:03:25` or `4 d 2:03:25`."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _measurement(value: float | None) -> str:
    """Format a measurement to four digits, or a large one in full: 14190, not 1.419e+04."""
    if value is None or not 1e4 <= abs(value) < 1e9:
        return _number(value, ".4g")
    return f"{value:.0f}"


def _number(value: float | None, spec: str) -> str:
    """Format `value`, or a dash of the same width if it is None."""
    return format(value, spec) if value is not None else "-".rjust(len(format(0.0, spec)))


def _line(text: str, width: int) -> str:
    """Return the beginning of a text on one line, without control characters."""
    words = "".join(c if c.isprintable() else " " for c in text[: 4 * width]).split()
    line = Text(" ".join(words))
    line.truncate(max(1, width), overflow="ellipsis")
    return line.plain
