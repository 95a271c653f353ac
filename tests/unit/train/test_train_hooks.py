# covers: megalite/train/hooks/hook.py
"""The loop acts on the requests of its hooks."""

from __future__ import annotations

import pytest

from megalite.checkpoint import Progress
from megalite.errors import Stopped
from megalite.parallel import Grid
from megalite.train.hooks import Hook, Outcome, StepReport
from megalite.train.spikes import LossSpike, StepDecision
from megalite.train.steps import ShutdownSignal
from tests.helpers.models import run_config
from tests.helpers.trainers import Notes, make_trainer, of


class Rewind(Hook):
    """A hook that rolls back to `to`, and records its calls."""

    def __init__(self, notes: Notes, to: Progress | None) -> None:
        self.notes, self.to = notes, to

    def begin(self, progress: Progress) -> Outcome:
        self.notes.calls.append(("begin", progress.step))
        return Outcome()

    def on_spike(self, spike: LossSpike, progress: Progress) -> Progress | None:
        self.notes.calls.append(("back from", spike.step))
        return self.to

    def close(self) -> None:
        self.notes.calls.append(("close", 0))


@pytest.mark.parametrize("back", [True, False])
def test_trainer_rolls_back_from_a_spike_or_skips_its_update(grid: Grid, back: bool) -> None:
    config = run_config(training={"steps": 6, "log_every": 5}, checkpoint={"every": 2})
    notes = Notes()
    hook = Rewind(notes, Progress(2, 8, 64) if back else None)
    trainer = make_trainer(config, grid, notes, ShutdownSignal(), valid=False, more=[hook])
    decide, spikes = trainer.detector, [4]

    class Detector:
        interventions, skip = decide.interventions, decide.skip

        def __call__(self, step: int, samples: int, loss: float, norm: float) -> StepDecision:
            if step in spikes:
                spikes.remove(step)
                return StepDecision("rollback", "it jumped")
            return decide(step, samples, loss, norm)

    trainer.detector = Detector()  # type: ignore[assignment]
    trainer.run()
    assert of(notes, "begin") == [0, 2 if back else 4]
    assert of(notes, "back from") == [4]
    assert of(notes, "refused") == [4]
    assert of(notes, "step") == [1, 2, 3, 4, *((3, 4) if back else ()), 5, 6]
    assert of(notes, "skip") == ([] if back else [4])
    assert of(notes, "save") == [2, 4, 6]
    assert trainer.progress == Progress(6, 24, 192)
    # after a rollback the mean covers the steps since then; otherwise the spike counts, too
    assert notes.rows[0]["mean_loss"] == (4.0 if back else 3.0)
    assert notes.calls[-1] == ("close", 0)


def test_trainer_saves_and_stops_on_the_request_of_a_hook(grid: Grid) -> None:
    class SaveAndStop(Hook):
        def after_step(self, report: StepReport) -> Outcome:
            assert (report.step, report.last) == (report.progress.step, report.step == 9)
            return Outcome(evaluated=True, score=1.5, save=report.step == 2, stop=report.step == 4)

    notes = Notes()
    config = run_config(training={"steps": 9}, checkpoint={"every": 0})
    more = [SaveAndStop()]
    trainer = make_trainer(config, grid, notes, ShutdownSignal(), valid=False, more=more)
    with pytest.raises(Stopped, match="after step 4 and saved"):
        trainer.run()
    assert of(notes, "save") == [2, 4]
    assert [progress.valid_loss for progress in notes.saved] == [1.5, 1.5]
