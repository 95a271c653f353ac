# covers: megalite/observe/progress.py
"""Progress messages of a long command: at once, then every few seconds."""

from __future__ import annotations

import logging

import pytest

from megalite.observe.progress import report_calls


def test_calls_are_reported_at_once_and_every_five_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    with caplog.at_level(logging.INFO, logger="megalite"):
        double = report_calls(lambda x: 2 * x, total=10, what="eval", clock=lambda: now[0])
        assert caplog.messages == ["eval: 0 of 10 batches"]
        for number in range(10):
            now[0] += 2.0
            assert double(number) == 2 * number
    assert caplog.messages[1:] == [
        "eval: 3 of 10 batches, left 0:14",
        "eval: 6 of 10 batches, left 0:08",
        "eval: 9 of 10 batches, left 0:02",
    ]
