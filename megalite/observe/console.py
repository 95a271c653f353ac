"""The run as a person watches it: one calm live view on a terminal, aligned lines elsewhere."""

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

_BAR = 40  # columns at most; under a quarter of them it is omitted
_SAMPLE = 160  # columns of a sample's line in a log


class Console:
    """Shows rows of a run on standard error."""

    def __init__(self, *, total_steps: int) -> None:
        self._total = total_steps
        self._first: tuple[int, float] | None = None  # step and clock of the first row
        self._saved: int | None = None
        self._live: Live | None = None
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []  # and its stream before
        console = RichConsole(stderr=True)
        # rich takes a log for a terminal where FORCE_COLOR is set
        if sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
            self._start_live(console)

    def train(self, row: Mapping[str, Any]) -> None:
        """Show one train row: on a terminal in place of the last one."""
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
        """Pictures are not drawn."""

    def valid(self, row: Mapping[str, Any], *, tokens: int | None = None) -> None:
        """Show one valid row, as a line that stays and begins with its split."""
        numbers = [
            f"{key} {_held_out(value)}"
            for key, value in row.items()
            if key != "step" and (value is None or isinstance(value, int | float))
        ]
        split = "test" if row.get("split") == "test" else "valid"
        step = f"{row['step']:{len(str(self._total))}}"
        logger.info("%s %s  %s", split, step, "  ".join(numbers))

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Show the beginnings of prompts and of what was written after them, a line each."""
        room = _SAMPLE if self._live is None else self._live.console.width
        for prompt, text in texts:
            begin = f"sample {step:{len(str(self._total))}}  {_line(prompt, room // 4)} -> "
            logger.info("%s%s", begin, _line(text, room - len(begin)))

    def event(self, step: int, name: str) -> None:
        """Remember the last checkpoint for the live view."""
        if name == "checkpoint":
            self._saved = step

    def close(self) -> None:
        """Leave the last view on the screen and give the terminal back."""
        if self._live is not None:
            for handler, stream in self._moved:
                handler.setStream(stream)
            self._live.stop()
            self._live = None

    def _start_live(self, console: RichConsole) -> None:
        """Draw below; log lines written to standard error scroll above the view.

        The cursor stays where one sees it: a process that is killed could not bring it back.
        """
        before = sys.stderr
        # what a library prints there lands on the same terminal, if that is one
        self._live = Live(
            Text(""), console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()
        )
        self._live.start()
        console.show_cursor()
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)  # rich's proxy by now
                self._moved.append((handler, before))

    def _seconds_left(self, step: int, step_seconds: float | None) -> float | None:
        """Return the seconds left, at the pace since the first row, evaluations and saves
        included.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step > first_step:
            step_seconds = (now - first_time) / (step - first_step)
        return None if step_seconds is None else (self._total - step) * step_seconds


class _View:
    """A bar with what belongs to it, and the numbers below; no line is wider than the terminal."""

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
    """Parts side by side, as many on a line as it has room for."""
    lines = list(parts[:1])
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def interval_loss(row: Mapping[str, Any]) -> float | None:
    """Return the loss to show for a train row: the mean over the steps since the row before.

    One step's loss jumps with its batch. Rows of MegaLite 0.1 have the step's own alone.
    """
    return row.get("mean_loss", row.get("loss"))


def train_parts(row: Mapping[str, Any], *, total_steps: int) -> list[str]:
    """Return a train row in parts whose widths stay the same from step to step."""
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
        parts[-1] += f", {each:,.0f} a device"
    if row.get("mfu") is not None:
        parts.append(f"mfu {100 * row['mfu']:4.1f} %")
    if row.get("peak_memory_bytes") is not None:
        parts.append(f"{row['peak_memory_bytes'] / 2**30:6.2f} GiB")
    return parts


def format_duration(seconds: float | None) -> str:
    """`3:25`, `2:03:25` or `4 d 2:03:25`."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _held_out(value: float | None) -> str:
    """Format a measurement with four digits, and a large one in full: 14190, not 1.419e+04."""
    if value is None or not 1e4 <= abs(value) < 1e9:
        return _number(value, ".4g")
    return f"{value:.0f}"


def _number(value: float | None, spec: str) -> str:
    """`value`, or a dash of the same width where the step had none."""
    return format(value, spec) if value is not None else "-".rjust(len(format(0.0, spec)))


def _line(text: str, longest: int) -> str:
    """Return the beginning of a text on one line, without what would steer the terminal."""
    words = "".join(c if c.isprintable() else " " for c in text[: 4 * longest]).split()
    line = Text(" ".join(words))
    line.truncate(max(1, longest), overflow="ellipsis")
    return line.plain
