# covers: megalite/train/loop.py megalite/train/hooks/logging.py megalite/observe/stragglers.py
# covers: megalite/train/hooks/validation.py megalite/train/hooks/checkpoints.py
"""The loop's schedule: at which steps it logs, validates, saves and stops; its parts are mocks."""

from __future__ import annotations

from typing import Any

import pytest

from megalite.checkpoint import Progress
from megalite.engine import StepResult
from megalite.errors import Stopped
from megalite.optim import learning_rate
from megalite.parallel import Grid
from megalite.train.hooks import validation
from megalite.train.steps import ShutdownSignal
from tests.helpers.models import run_config
from tests.helpers.trainers import Notes, make_trainer, of


def run(
    grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
    *,
    progress: Progress | None = None,
    stop_at: int = 0,
    valid: bool = True,
    every: int = 0,
    background: bool = False,
    writing: int = 0,
    grace: float = 90.0,
    **training: Any,
) -> Notes:
    """Train a whole run. A stop signal arrives during step `stop_at`."""
    checkpoint = {"every": every, "background": background, "stop_grace_seconds": grace}
    config = run_config(training=training, checkpoint=checkpoint)
    notes, shutdown = Notes(), ShutdownSignal()
    notes.writing = writing
    monkeypatch.setattr(validation, "mean_loss", lambda *_, **__: 2.0)
    if stop_at:
        step = notes.train_step

        def train_step(batches: Any, **options: Any) -> StepResult:
            if options["step"] == stop_at:
                shutdown.name = "SIGTERM"
            return step(batches, **options)

        notes.train_step = train_step  # type: ignore[method-assign]
    try:
        make_trainer(config, grid, notes, shutdown, valid=valid, progress=progress).run()
    except Stopped as error:
        notes.calls.append(("stopped", str(error)))
    return notes


def test_trainer_logs_validates_and_saves_at_their_intervals(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = run(grid, monkeypatch, steps=7, log_every=3, eval_every=2, every=3)
    assert of(notes, "step") == [1, 2, 3, 4, 5, 6, 7]
    assert of(notes, "log") == [3, 6, 7]
    assert of(notes, "valid") == [0, 2, 4, 6, 7]
    assert of(notes, "save") == of(notes, "checkpoint") == [3, 6, 7]
    # a step is validated before it is saved
    assert notes.calls[-4:] == [("valid", 7), ("save", 7), ("published", 7), ("checkpoint", 7)]


def test_trainer_validates_and_saves_the_last_step_once(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = run(grid, monkeypatch, steps=6, log_every=3, eval_every=3, every=2)
    assert of(notes, "log") == [3, 6]
    assert of(notes, "valid") == [0, 3, 6]
    assert of(notes, "save") == [2, 4, 6]


def test_trainer_without_intervals_logs_validates_and_saves_the_last_step(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = run(grid, monkeypatch, steps=4, log_every=100, eval_every=0, every=0)
    assert (of(notes, "log"), of(notes, "valid"), of(notes, "save")) == ([4], [0, 4], [4])
    notes = run(grid, monkeypatch, steps=2, valid=False)
    assert of(notes, "valid") == []


def test_train_rows_have_progress_rates_and_means(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has 4 samples of 8 tokens."""
    notes = run(grid, monkeypatch, steps=5, log_every=2, every=2)
    assert notes.saved == [Progress(2, 8, 64), Progress(4, 16, 128), Progress(5, 20, 160)]
    config = run_config(training={"steps": 5})
    assert notes.rates == [learning_rate(config, step) for step in range(1, 6)]
    for row in notes.rows:
        step = row["step"]
        assert (row["loss"], row["lr"]) == (float(step), notes.rates[step - 1])
        assert (row["tokens"], row["samples"], row["grad_norm"]) == (32 * step, 4 * step, 0.5)
        assert row["mfu"] is None
        assert row["peak_memory_bytes"] > 10**6
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(32)
    # means over the steps since the previous row: 1 and 2, 3 and 4, 5
    assert [row["mean_loss"] for row in notes.rows] == [1.5, 3.5, 5.0]
    keys = "step loss mean_loss lr grad_norm tokens samples tokens_per_second mfu step_seconds"
    assert set(notes.rows[0]) == {
        *keys.split(),
        "peak_memory_bytes",
        "tokens_per_second_per_device",
    }


def test_resumed_run_continues_its_counts_without_a_first_validation(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = run(
        grid,
        monkeypatch,
        steps=6,
        progress=Progress(3, 1000, 5000),
        log_every=1,
        eval_every=5,
        every=5,
    )
    assert of(notes, "step") == [4, 5, 6]
    assert of(notes, "valid") == [5, 6]
    assert notes.saved == [Progress(5, 1008, 5064), Progress(6, 1012, 5096)]
    assert notes.rates == [learning_rate(run_config(training={"steps": 6}), s) for s in (4, 5, 6)]


@pytest.mark.parametrize("done", [6, 9])
def test_finished_run_trains_and_saves_nothing(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    notes = run(grid, monkeypatch, steps=6, progress=Progress(done, 24, 192))
    assert of(notes, "step") == of(notes, "save") == []


def test_stop_signal_saves_and_ends_the_run(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks reduce the flag a step ahead, so at most two more steps are taken."""
    notes = run(grid, monkeypatch, steps=50, stop_at=5)
    last = of(notes, "step")[-1]
    assert 5 <= last <= 7
    assert of(notes, "signal") == of(notes, "save") == [last]
    assert notes.saved == [Progress(last, 4 * last, 32 * last)]
    (message,) = of(notes, "stopped")
    assert f"stopped by SIGTERM after step {last}" in message
    assert Stopped("").exit_code == 75


def test_stop_signal_after_a_save_does_not_save_again(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = run(grid, monkeypatch, steps=50, stop_at=5, every=1)
    saved = of(notes, "save")
    assert saved == sorted(set(saved))
    assert saved[-1] == of(notes, "step")[-1]


def test_stop_signal_in_the_last_step_lets_the_run_finish(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = run(grid, monkeypatch, steps=5, stop_at=5)
    assert of(notes, "save") == [5]
    assert of(notes, "stopped") == []


# --- background saves ---


def test_background_save_is_published_during_training(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next save, and the end of the run, wait until the checkpoint is written."""
    notes = run(grid, monkeypatch, steps=9, every=3, background=True, writing=1, valid=False)
    quick = [call for call in notes.calls if call[0] in ("step", "save", "published")]
    assert quick[quick.index(("save", 3)) : quick.index(("save", 6))] == [
        *(("save", 3), ("step", 4), ("step", 5), ("published", 3), ("step", 6))
    ]
    assert quick[-2:] == [("save", 9), ("published", 9)]
    notes = run(grid, monkeypatch, steps=9, every=3, background=True, writing=99, valid=False)
    slow = [call for call in notes.calls if call[0] in ("step", "save", "published")]
    assert slow[slow.index(("save", 3)) : slow.index(("save", 6)) + 1] == [
        *(("save", 3), ("step", 4), ("step", 5), ("step", 6), ("published", 3), ("save", 6))
    ]
    assert of(notes, "published") == of(notes, "checkpoint") == [3, 6, 9]


def test_stop_signal_waits_for_the_background_save(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = run(
        grid, monkeypatch, steps=9, every=3, background=True, writing=99, stop_at=4, valid=False
    )
    assert notes.calls[-1][0] == "stopped"
    assert len(of(notes, "published")) == 2
    assert of(notes, "published") == of(notes, "save") == of(notes, "checkpoint")


@pytest.mark.parametrize(("grace", "saved"), [(2.9, [3]), (3.0, [3, 5])])
def test_stop_signal_does_not_begin_a_save_longer_than_the_grace_period(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, grace: float, saved: list[int]
) -> None:
    notes = run(grid, monkeypatch, steps=9, every=3, stop_at=4, valid=False, grace=grace)
    assert of(notes, "save") == of(notes, "published") == saved
    message = str(notes.calls[-1][1])
    assert ("resumes it from step 3" in message) == (saved == [3]), message
