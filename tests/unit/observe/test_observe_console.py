"""What a person sees: lines in a log, one view on a terminal."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
from pathlib import Path
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
console.train(row)
log.logger.warning("something to say")
console.event(5, "checkpoint")
console.train({**row, "step": 10})
sys.stdout.write("a report\\n")
console.close()
log.logger.info("after the end")
"""


def as_line(row: dict[str, Any], total_steps: int) -> str:
    return "  ".join(train_parts(row, total_steps=total_steps))


def test_a_train_row_is_one_aligned_line() -> None:
    line = as_line(ROW, total_steps=300)
    assert line == (
        "step   7/300  loss  3.2157  lr 3.00e-04  grad norm   0.987     12,346 tokens/s"
        "  mfu 45.7 %    1.50 GiB"
    )
    assert len(as_line({**ROW, "step": 300, "loss": 12.5}, total_steps=300)) == len(line)


def test_missing_numbers_keep_their_place() -> None:
    bare = as_line({**ROW, "loss": None, "grad_norm": None}, total_steps=300)
    assert len(bare) == len(as_line(ROW, total_steps=300))
    assert "loss       -  " in bare
    assert "mfu" not in as_line({**ROW, "mfu": None}, total_steps=300)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (90061, "1 d 1:01:01"), (None, "-:--")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("megalite"), "propagate", True)
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="megalite"):
        console = Console(total_steps=10)
        console.train({**ROW, "step": 2})
        console.train({**ROW, "step": 4})
        console.valid({"step": 4, "loss": 3.0, "perplexity": 20.08554, "kind": "valid"})
        console.close()
    first, second, valid = caplog.messages
    assert first.endswith("left 0:04")  # 8 steps at the row's own 0.5 s
    assert second.endswith("left 0:12")  # 6 steps at the 2 s that each took by the clock
    assert valid == "valid  4  loss 3  perplexity 20.09"


def test_a_terminal_shows_one_view_below_the_messages(tmp_path: Path) -> None:
    """In a process of its own with a pseudo-terminal as standard error."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        stderr=follower,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        env=environment,
    )
    os.close(follower)
    screen = b""
    try:
        while part := os.read(leader, 65536):
            screen += part
    except OSError:  # Linux ends a pseudo-terminal without a writer this way
        pass
    os.close(leader)
    text = screen.decode()
    assert done.returncode == 0, text
    assert done.stdout == "a report\n"
    assert "step  7/20" in text
    assert "step 10/20" in text
    assert "50 %" in text
    assert "saved at step 5" in text
    assert text.index("something to say") < text.index("step 10/20") < text.index("after the end")
    hidden, shown = text.index("\x1b[?25l"), text.index("\x1b[?25h")
    assert shown == hidden + len("\x1b[?25l")  # at once: a kill would leave it hidden
    assert text.count("\x1b[?25l") == 1
