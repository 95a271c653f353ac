# covers: megalite/observe/stragglers.py
"""The loop's rhythm: when it logs, validates, saves and stops, with parts that only take notes."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalite.checkpoint import Place
from megalite.data import StepBatches
from megalite.engine import StepResult
from megalite.errors import Stopped
from megalite.observe import Sections, Stragglers, Trace
from megalite.optim import learning_rate
from megalite.parallel import Grid
from megalite.plan import make_plan
from megalite.train import feed, loop
from megalite.train.feed import Feed, StopRequest
from megalite.train.judge import Judge
from megalite.train.ledger import Ledger
from megalite.train.loop import Trainer
from tests.helpers.models import make_batch, run_config


class Notes:
    """An engine, a recorder and a saver that write down what they are asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.rows: list[dict[str, Any]] = []
        self.rates: list[float] = []
        self.places: list[Place] = []

    def train_step(
        self, batches: Any, *, divisor: float, lr: float, step: int, inspect: Any, accept: Any
    ) -> StepResult:
        assert inspect is None
        self.calls.append(("step", step))
        self.rates.append(lr)
        assert divisor == sum(batch.targets for batch in batches)
        result = StepResult(torch.tensor(float(step)), torch.tensor(0.5))
        if not accept(result.loss, result.grad_norm):
            self.calls.append(("refused", step))
        return result

    def train(self, row: dict[str, Any]) -> None:
        self.calls.append(("log", row["step"]))
        self.rows.append(row)

    def valid(self, row: dict[str, Any], *, tokens: int) -> None:
        self.calls.append(("valid", row["step"]))
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))

    def event(self, step: int, name: str, **fields: Any) -> None:
        self.calls.append((name, step))

    def status(self, state: str, *, step: int, **fields: Any) -> None:
        pass

    # a saver whose files take `writing` steps

    writing, begun, seconds = 0, 0, 3.0
    under_way: Place | None = None

    def begin(self, place: Place, *, snapshot: bool) -> None:
        assert self.under_way is None
        self.calls.append(("save", place.step))
        self.places.append(place)
        self.under_way, self.begun = place, self.begun + 1

    @property
    def written(self) -> int:
        if self.under_way is None:
            return self.begun
        since = self.calls[self.calls.index(("save", self.under_way.step)) :]
        steps = sum(call[0] == "step" for call in since)
        return self.begun - (steps < self.writing)

    def record_score(self, place: Place) -> None:
        self.calls.append(("scored", place.step))

    def finish(self) -> Path:
        assert self.under_way is not None
        place, self.under_way = self.under_way, None
        self.calls.append(("published", place.step))
        return Path(f"checkpoints/step_{place.step:08d}")


class Steps:
    """A loader of one batch a step, as a Loader hands them out."""

    def __init__(self) -> None:
        self.made, self.closed = 0, False

    def __next__(self) -> StepBatches:
        batch = make_batch(run_config().model, seed=self.made)
        self.made += 1
        return StepBatches(self.made, [batch], batch.targets, 32)

    def close(self) -> None:
        self.closed = True


def run(
    grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
    *,
    place: Place | None = None,
    stop_at: int = 0,
    valid: bool = True,
    every: int = 0,
    background: bool = False,
    writing: int = 0,
    grace: float = 90.0,
    **training: Any,
) -> Notes:
    """A whole run; `stop_at` asks it to stop while that step is computed."""
    checkpoint = {"every": every, "background": background, "grace_seconds": grace}
    config = run_config(training=training, checkpoint=checkpoint)
    notes, request = Notes(), StopRequest()
    notes.writing = writing
    monkeypatch.setattr(loop, "mean_loss", lambda *_, **__: 2.0)
    if stop_at:
        step = notes.train_step

        def train_step(batches: Any, **given: Any) -> StepResult:
            if given["step"] == stop_at:
                request.name = "SIGTERM"
            return step(batches, **given)

        notes.train_step = train_step  # type: ignore[method-assign]
    parts: Any = notes
    dataset: Any = SimpleNamespace()
    feed = Feed(Steps(), grid, request, lambda: notes.written)  # type: ignore[arg-type]
    trainer = Trainer(
        config=config,
        plan=make_plan(config, world_size=1, device="cpu"),
        grid=grid,
        engine=parts,
        feed=feed,
        valid=dataset if valid else None,
        recorder=parts,
        stop=request,
        place=place or Place(),
        saver=parts,
        retain=lambda: None,
        trace=Trace(Path("nowhere"), 0, None),
        judge=Judge(config, Ledger(Path("nowhere"), grid, 16), scaled=False),
        sections=Sections(),
        stragglers=Stragglers(torch.nn.Identity(), grid),
    )
    try:
        trainer.run()
    except Stopped as error:
        notes.calls.append(("stopped", str(error)))
    finally:
        feed.close()
    return notes


def of(notes: Notes, name: str) -> list[Any]:
    return [step for call, step in notes.calls if call == name]


def test_the_rhythm_of_a_run(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = run(grid, monkeypatch, steps=7, log_every=3, eval_every=2, every=3)
    assert of(notes, "step") == [1, 2, 3, 4, 5, 6, 7]
    assert of(notes, "log") == [3, 6, 7]
    assert of(notes, "valid") == [0, 2, 4, 6, 7]
    assert of(notes, "save") == of(notes, "checkpoint") == [3, 6, 7]
    # validation of a step comes before its checkpoint, as metrics.jsonl shows them
    assert notes.calls[-4:] == [("valid", 7), ("save", 7), ("published", 7), ("checkpoint", 7)]


def test_the_last_step_is_not_done_twice(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = run(grid, monkeypatch, steps=6, log_every=3, eval_every=3, every=2)
    assert of(notes, "log") == [3, 6]
    assert of(notes, "valid") == [0, 3, 6]
    assert of(notes, "save") == [2, 4, 6]


def test_nothing_in_between(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = run(grid, monkeypatch, steps=4, log_every=100, eval_every=0, every=0)
    assert (of(notes, "log"), of(notes, "valid"), of(notes, "save")) == ([4], [0, 4], [4])
    notes = run(grid, monkeypatch, steps=2, valid=False)
    assert of(notes, "valid") == []


def test_places_rates_and_rows(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 samples of 8 tokens a step, whatever the micro-batches."""
    notes = run(grid, monkeypatch, steps=5, log_every=2, every=2)
    assert notes.places == [Place(2, 8, 64), Place(4, 16, 128), Place(5, 20, 160)]
    config = run_config(training={"steps": 5})
    assert notes.rates == [learning_rate(config, step) for step in range(1, 6)]
    for row in notes.rows:
        step = row["step"]
        assert (row["loss"], row["lr"]) == (float(step), notes.rates[step - 1])
        assert (row["tokens"], row["samples"], row["grad_norm"]) == (32 * step, 4 * step, 0.5)
        assert row["mfu"] is None
        assert row["peak_memory_bytes"] > 10**6
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(32)
    # the mean over the steps since the row before: 1 and 2, 3 and 4, 5
    assert [row["mean_loss"] for row in notes.rows] == [1.5, 3.5, 5.0]
    keys = "step loss mean_loss lr grad_norm tokens samples tokens_per_second mfu step_seconds"
    assert set(notes.rows[0]) == {*keys.split(), "peak_memory_bytes"}


def test_a_resumed_run_goes_on(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers of the whole run, and without a validation of step 0."""
    notes = run(
        grid, monkeypatch, steps=6, place=Place(3, 1000, 5000), log_every=1, eval_every=5, every=5
    )
    assert of(notes, "step") == [4, 5, 6]
    assert of(notes, "valid") == [5, 6]
    assert notes.places == [Place(5, 1008, 5064), Place(6, 1012, 5096)]
    assert notes.rates == [learning_rate(run_config(training={"steps": 6}), s) for s in (4, 5, 6)]


@pytest.mark.parametrize("done", [6, 9])
def test_a_finished_run_trains_and_saves_nothing(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    notes = run(grid, monkeypatch, steps=6, place=Place(done, 24, 192))
    assert of(notes, "step") == of(notes, "save") == []


def test_a_stop_saves_and_leaves(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag is agreed on a step ahead: at most two more steps are taken."""
    notes = run(grid, monkeypatch, steps=50, stop_at=5)
    last = of(notes, "step")[-1]
    assert 5 <= last <= 7
    assert of(notes, "signal") == of(notes, "save") == [last]
    assert notes.places == [Place(last, 4 * last, 32 * last)]
    (message,) = of(notes, "stopped")
    assert f"stopped by SIGTERM after step {last}" in message
    assert Stopped("").exit_code == 75


def test_a_stop_right_after_a_save_does_not_save_again(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = run(grid, monkeypatch, steps=50, stop_at=5, every=1)
    saved = of(notes, "save")
    assert saved == sorted(set(saved))
    assert saved[-1] == of(notes, "step")[-1]


def test_a_stop_in_the_last_step_is_still_done(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = run(grid, monkeypatch, steps=5, stop_at=5)
    assert of(notes, "save") == [5]
    assert of(notes, "stopped") == []


# --- the feed and its signals ---


def test_training_goes_on_while_a_checkpoint_is_written(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published once written; a save that is due waits for the one before, and so does the end."""
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


def test_a_stop_ends_the_save_under_way_first(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = run(
        grid, monkeypatch, steps=9, every=3, background=True, writing=99, stop_at=4, valid=False
    )
    assert notes.calls[-1][0] == "stopped"
    assert len(of(notes, "published")) == 2
    assert of(notes, "published") == of(notes, "save") == of(notes, "checkpoint")


@pytest.mark.parametrize(("grace", "saved"), [(2.9, [3]), (3.0, [3, 5])])
def test_a_save_that_takes_longer_than_the_grace_is_not_begun(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, grace: float, saved: list[int]
) -> None:
    """A half-written checkpoint helps nobody; the one before is there."""
    notes = run(grid, monkeypatch, steps=9, every=3, stop_at=4, valid=False, grace=grace)
    assert of(notes, "save") == of(notes, "published") == saved
    told = str(notes.calls[-1][1])
    assert ("goes on from step 3" in told) == (saved == [3]), told


def test_the_feed_hands_out_every_step_once(grid: Grid) -> None:
    steps, request = Steps(), StopRequest()
    feed = Feed(steps, grid, request, lambda: 0)  # type: ignore[arg-type]
    seen = [feed.next() for _ in range(5)]
    assert [step.batches.place for step in seen] == [1, 2, 3, 4, 5]
    assert all(step.targets == step.batches.targets and not step.stop for step in seen)
    request.name = "SIGUSR1"
    stops = [feed.next()[2] for _ in range(3)]
    assert stops == [False, True, True]
    feed.close()
    assert steps.closed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_remembered_and_a_second_one_ends_it(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert request.name is None
        signal.raise_signal(number)
        assert request.name == number.name
        ended: list[Any] = []
        signal.raise_signal(number)  # the launcher's echo of the same wish
        with monkeypatch.context() as patch:
            patch.setattr(feed, "_SAME_WISH", -1.0)
            patch.setattr(signal, "signal", lambda *given: ended.append(given))
            real = signal.raise_signal
            patch.setattr(signal, "raise_signal", ended.append)
            real(number)
        assert ended == [(number, signal.SIG_DFL), number]
        assert request.name == number.name
    assert signal.getsignal(number) is before


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before
