# covers: megalite/observe/console.py
"""Console output: lines in a log, a live view on a terminal."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from typing import Any

import pytest

from megalite.observe.console import Console, format_duration, train_parts

ROW = {
    "step": 7,
    "loss": 3.21567,
    "lr": 3e-4,
    "grad_norm": 0.987,
    "tokens_per_second": 12345.6,
    "mfu": 0.4567,
    "step_seconds": 0.5,
    "peak_memory_bytes": 3 * 2**29,
}

PROGRAM = """
import logging, sys
from megalite import log
from megalite.observe.console import Console
log.setup()
console = Console(total_steps=20)
row = dict(step=7, loss=3.2, lr=3e-4, grad_norm=0.9, tokens_per_second=1e4, step_seconds=0.5)
row |= dict(mfu=0.45, peak_memory_bytes=3 * 2**29)
console.train(row)
log.logger.warning("something to say")
console.samples(7, [("def f(\\n", "\u4e16\u754c\\x1b[2J and so on" + 200 * " more")])
console.event(5, "checkpoint")
console.train({**row, "step": 10})
sys.stdout.write("a report\\n")
console.close()
log.logger.info("after the end")
"""


def as_line(row: dict[str, Any], total_steps: int) -> str:
    return "  ".join(train_parts(row, total_steps=total_steps))


def test_train_row_is_one_aligned_line() -> None:
    line = as_line(ROW, total_steps=300)
    assert line == (
        "step   7/300  loss  3.2157  lr 3.00e-04  grad norm   0.987     12,346 tokens/s"
        "  mfu 45.7 %    1.50 GiB"
    )
    assert len(as_line({**ROW, "step": 300, "loss": 12.5}, total_steps=300)) == len(line)


def test_tokens_of_one_device_follow_those_of_the_run() -> None:
    row = {**ROW, "tokens_per_second": 12000.0}
    assert "12,000 tokens/s, 3,000 per device" in as_line(
        {**row, "tokens_per_second_per_device": 3000.0}, total_steps=300
    )
    alone = as_line({**row, "tokens_per_second_per_device": 12000.0}, total_steps=300)
    assert "per device" not in alone


def test_train_row_shows_the_mean_loss_since_the_previous_row() -> None:
    assert "loss  3.5000" in as_line({**ROW, "mean_loss": 3.5}, total_steps=300)
    assert "loss       -  " in as_line({**ROW, "mean_loss": None}, total_steps=300)


@pytest.mark.parametrize(
    ("value", "text"), [(14190.4, "14190"), (20.094, "20.09"), (2.5e11, "2.5e+11"), (None, "-")]
)
def test_valid_row_shows_large_measurements_in_full(
    caplog: pytest.LogCaptureFixture, value: float | None, text: str
) -> None:
    caplog.set_level("INFO", logger="megalite")
    Console(total_steps=4).valid({"step": 4, "perplexity": value})
    assert caplog.messages[-1].split() == ["valid", "4", "perplexity", text]


def test_valid_row_begins_with_its_split(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="megalite")
    Console(total_steps=12).valid({"step": 9, "split": "test", "loss": 2.0})
    Console(total_steps=12).valid({"step": 9, "split": "valid", "loss": 2.0})
    assert caplog.messages[-2:] == ["test  9  loss 2", "valid  9  loss 2"]


def test_missing_numbers_keep_their_width() -> None:
    bare = as_line({**ROW, "loss": None, "grad_norm": None}, total_steps=300)
    assert len(bare) == len(as_line(ROW, total_steps=300))
    assert "loss       -  " in bare
    assert "mfu" not in as_line({**ROW, "mfu": None}, total_steps=300)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (90061, "1 d 1:01:01"), (None, "-:--")],
)
def test_format_duration_uses_days_hours_and_minutes(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_log_lines_estimate_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="megalite"):
        console = Console(total_steps=10)
        console.train({**ROW, "step": 2})
        console.train({**ROW, "step": 4})
        console.valid({"step": 4, "loss": 3.0, "perplexity": 20.08554, "kind": "valid"})
        console.close()
    first, second, valid = caplog.messages
    assert first.endswith("left 0:04")  # 8 steps at the row's 0.5 s
    assert second.endswith("left 0:12")  # 6 steps at the measured 2 s
    assert valid == "valid  4  loss 3  perplexity 20.09"


def on_terminal(program: str, columns: int) -> tuple[Any, str]:
    """Run a program with a terminal as standard error. Return its screen and standard output."""
    pyte = pytest.importorskip("pyte", reason="pyte, which reads the screen, is not installed")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=follower,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "TERM": "xterm"},
    )
    os.close(follower)
    screen = pyte.Screen(columns, 30)
    stream = pyte.ByteStream(screen)
    with suppress(OSError):  # Linux ends a pseudo-terminal without a writer this way
        while part := os.read(leader, 65536):
            stream.feed(part)
    os.close(leader)
    return screen, process.communicate(timeout=60)[0]


def lines_of(screen: Any) -> list[str]:
    return [line.rstrip() for line in screen.display if line.strip()]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_terminal_shows_one_view_below_the_messages(columns: int) -> None:
    screen, output = on_terminal(PROGRAM, columns)
    assert output == "a report\n"
    lines = lines_of(screen)
    assert lines[0] == "warning: something to say"
    assert lines[1].startswith("sample  7  def f( -> 世界 [2J and so on more")
    assert lines[1].endswith("…")
    assert lines[-1] == "after the end"
    view = "  ".join(lines[2:-1]).split("  ")
    view = [part.strip(" \u2501\u2578\u257a") for part in view]  # without the bar
    assert [part for part in view if part] == [
        *("step 10/20", "50 %", "left 0:00", "saved at step 5", "loss", "3.2000", "lr 3.00e-04"),
        *("grad norm", "0.900", "10,000 tokens/s", "mfu 45.0 %", "1.50 GiB"),
    ]
    assert len(lines) == (6 if columns < 95 else 5)
    assert not screen.cursor.hidden


def test_killed_process_leaves_the_cursor_visible() -> None:
    program = PROGRAM.replace("console.close()", "import os; os.kill(os.getpid(), 9)")
    screen, _ = on_terminal(program, 80)
    assert lines_of(screen)[-1].endswith("1.50 GiB")
    assert not screen.cursor.hidden


def test_log_gets_no_escape_codes_with_force_color(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(total_steps=20)
    console.train(ROW)
    console.close()
    assert "\x1b" not in capsys.readouterr().err
