# covers: megalite/train/steps.py
"""Inputs of steps with their shared numbers, and stop signals."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from megalite.parallel import Grid
from megalite.train import steps
from megalite.train.steps import ShutdownSignal, StepIterator, StopPoll
from tests.helpers.trainers import Steps


def test_step_iterator_returns_every_step_once(grid: Grid) -> None:
    loader, shutdown = Steps(), ShutdownSignal()
    steps = StepIterator(loader, grid, shutdown, written=lambda: 0)  # type: ignore[arg-type]
    seen = [steps.next() for _ in range(5)]
    assert [step.batches.place for step in seen] == [1, 2, 3, 4, 5]
    assert all(step.targets == step.batches.targets and not step.stop for step in seen)
    shutdown.name = "SIGUSR1"
    stops = [steps.next().stop for _ in range(3)]
    assert stops == [False, True, True]
    steps.close()
    assert loader.closed


def test_stop_poll_returns_the_result_of_the_previous_call(grid: Grid) -> None:
    shutdown = ShutdownSignal()
    poll = StopPoll(grid, shutdown)
    assert not poll()
    shutdown.name = "SIGTERM"
    assert [poll(), poll()] == [False, True]
    poll.close()
    assert not poll()  # `close` discarded the earlier result
    poll.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_shutdown_signal_stores_the_first_and_ends_the_process_at_a_later_one(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    with ShutdownSignal() as shutdown:
        assert shutdown.name is None
        signal.raise_signal(number)
        assert shutdown.name == number.name
        ended: list[Any] = []
        signal.raise_signal(number)  # the launcher repeats the signal
        with monkeypatch.context() as patch:
            patch.setattr(steps, "DEBOUNCE_SECONDS", -1.0)
            patch.setattr(signal, "signal", lambda *arguments: ended.append(arguments))
            real = signal.raise_signal
            patch.setattr(signal, "raise_signal", ended.append)
            real(number)
        assert ended == [(number, signal.SIG_DFL), number]
        assert shutdown.name == number.name
    assert signal.getsignal(number) is before


def test_shutdown_signal_restores_the_handlers_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), ShutdownSignal():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before
