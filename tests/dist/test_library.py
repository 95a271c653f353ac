# covers: megalite/api.py megalite/isolation.py megalite/engine/deepspeed/process.py
"""Runs in one process, as in a notebook: in sequence, in a thread, and stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import megalite
from megalite import env
from megalite.env import has_compiler
from megalite.errors import LaunchError
from megalite.launchers import Launch
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, run_file, zero

Raw = dict[str, Any]
BF16 = {"training": {"precision": "bf16"}}
DROPOUT = {"model": {"hidden_dropout": 0.1}}
COMPILED = {"training": {"compile": True, "steps": 3, "eval_every": 0}}
# in this order, leftovers of a run would change a later run: see megalite/engine/deepspeed/process
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("zero3", 3, {}),
    ("zero1", 1, {}),
    ("zero3_bf16", 3, BF16),
    ("zero2_bf16", 2, BF16),
    ("zero0_dropout", 0, DROPOUT),
    ("zero1_dropout", 1, DROPOUT),
    ("zero3_again", 3, {}),
]


def be_alone() -> None:
    """Remove the variables of a launcher, because a notebook has none."""
    ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    env.replace({name: value for name, value in os.environ.items() if name not in ours})


def make_runs(
    shards: dict[str, str], folder: Path, cases: Sequence[tuple[str, int, dict[str, Any]]]
) -> list[Raw]:
    runs = []
    for name, stage, sections in cases:
        raw = run_file(shards, folder, name=name, deepspeed=zero(stage), **sections)
        raw["training"] |= {"steps": min(raw["training"]["steps"], 4), "eval_every": 2}
        runs.append(raw)
    return runs


def train_each(_launch: Launch, runs: Sequence[Raw]) -> list[Any]:
    be_alone()
    return [train_one(raw) for raw in runs]


def train_one(raw: Raw) -> list[Any]:
    """Train, and return loss, gradient norm and held-out loss of all steps."""
    result = megalite.pretrain(raw)
    assert result.state == "done"
    assert result.directory == Path(raw["logging"]["directory"]) / raw["name"]
    assert result.checkpoint is not None
    valid = [row["loss"] for row in result.metrics if row["kind"] == "valid"]
    return [*curve(raw), valid]


def check_against_fresh(runs: list[Raw], folder: Path) -> None:
    """Compare runs of one process with the same runs in separate processes."""
    (together,) = run_ranks(train_each, 1, runs)
    for raw, numbers in zip(runs, together, strict=True):
        alone = raw | {"logging": raw["logging"] | {"directory": str(folder / "alone")}}
        assert run_ranks(train_each, 1, [alone]) == [[numbers]], raw["name"]
        assert all(loss > 0 for loss, _ in numbers[:-1])


def test_runs_of_one_process_give_the_numbers_of_fresh_ones(
    shards: dict[str, str], tmp_path: Path
) -> None:
    check_against_fresh(make_runs(shards, tmp_path, CASES), tmp_path)


def train_on_ranks(_launch: Launch, runs: Sequence[Raw]) -> list[Any]:
    return [train_one(raw) for raw in runs]


def test_ranks_that_a_launcher_started_train_several_runs(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """Each start has groups of its own, though address and port are those of the first."""
    runs = make_runs(shards, tmp_path, CASES[:2])
    first, second = run_ranks(train_on_ranks, 2, runs)
    assert first == second
    again = [raw | {"name": f"{raw['name']}_fresh"} for raw in runs[1:]]
    assert run_ranks(train_on_ranks, 2, again) == [first[1:], first[1:]]


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
def test_compiled_runs_of_one_process_give_the_numbers_of_fresh_ones(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """The runs have different shapes. With leftovers of earlier runs their graphs are dynamic."""
    training = COMPILED["training"] | {"micro_batch_size": 1}
    other: dict[str, Any] = {"data": {"sequence_length": 24}, "training": training}
    cases = [("compiled", 1, COMPILED), ("not_compiled", 1, {}), ("compiled_zero3", 3, other)]
    check_against_fresh(make_runs(shards, tmp_path, cases), tmp_path)


def names_of_torch() -> dict[tuple[str, str], int]:
    """Return the identity of each function of torch that DeepSpeed could replace."""
    import torch

    owners: list[Any] = [torch, torch.nn.functional, torch.Tensor, torch.nn.Module]
    owners += [torch.nn.Linear, torch.nn.Embedding, torch.autograd, torch.distributed]
    return {
        (str(owner), name): id(value)
        for owner in owners
        for name, value in vars(owner).items()
        if callable(value) or name.startswith("__")
    }


def leave_no_trace(_launch: Launch, runs: Sequence[Raw]) -> dict[str, Any]:
    """Train, and return the changes of the process."""
    import torch
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    be_alone()
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    states = (torch.get_rng_state(), dict(os.environ), names_of_torch())
    for raw in runs:
        megalite.pretrain(raw)
    random, environ, names = states
    after = names_of_torch()
    return {
        "dtype": torch.get_default_dtype() == torch.float64,
        "threads": torch.get_num_threads(),
        "random": torch.equal(torch.get_rng_state(), random),
        "environment": {*os.environ.items()} ^ {*environ.items()},
        "names": sorted(str(name) for name in names if after.get(name) != names[name]),
        "new names": sorted(str(n) for n in after if n not in names and "class" in n[0]),
        "modules": len(FWD_MODULE_STACK),
        "groups": torch.distributed.is_initialized(),
        "signals": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "threads left": sorted(
            thread.name for thread in threading.enumerate() if not thread.name.startswith("Main")
        ),
    }


def test_run_does_not_change_its_process(shards: dict[str, str], tmp_path: Path) -> None:
    (changes,) = run_ranks(leave_no_trace, 1, make_runs(shards, tmp_path, CASES[:3]))
    assert changes == {
        "dtype": True,
        "threads": 2,
        "random": True,
        "environment": set(),
        "names": [],
        "new names": [],
        "modules": 0,
        "groups": False,
        "signals": True,
        "threads left": [],
    }


def release_memory(_launch: Launch, runs: Sequence[Raw]) -> list[int]:
    """Return the number of models in memory after each run."""
    import gc

    from megalite.model import LanguageModel

    be_alone()
    living = []
    for raw in runs:
        megalite.pretrain(raw)
        living.append(sum(isinstance(value, LanguageModel) for value in gc.get_objects()))
    return living


def test_run_releases_its_model(shards: dict[str, str], tmp_path: Path) -> None:
    runs = make_runs(shards, tmp_path, CASES[:5])
    assert run_ranks(release_memory, 1, runs) == [[0] * len(runs)]


class StopAt(megalite.Hook):
    """Hook that stops a run, and records its arguments."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.reports: list[megalite.StepReport] = []
        self.saved: list[Path] = []

    def after_step(self, report: megalite.StepReport) -> megalite.Outcome:
        self.reports.append(report)
        return megalite.Outcome(stop=report.step == self.step)

    def after_save(self, report: megalite.SaveReport) -> None:
        self.saved.append(report.folder)


def run_in_thread(_launch: Launch, raw: Raw) -> dict[str, Any]:
    """Train in a thread, try a second run meanwhile, and continue after a hook has stopped it."""
    be_alone()
    hook = StopAt(3)
    results: list[megalite.RunResult] = []
    errors: list[str] = []

    class Second(megalite.Hook):
        def after_step(self, report: megalite.StepReport) -> megalite.Outcome:
            if report.step == 2:
                try:
                    megalite.pretrain(raw | {"name": "second"})
                except LaunchError as error:
                    errors.append(str(error))
            return megalite.Outcome()

    work = lambda: results.append(megalite.pretrain(raw, hooks=[hook, Second()]))  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    results.append(megalite.pretrain(raw))
    return {
        "states": [result.state for result in results],
        "checkpoints": [result.checkpoint and result.checkpoint.name for result in results],
        "steps": [report.step for report in hook.reports],
        "losses": [report.loss for report in hook.reports],
        "saved": [folder.name for folder in hook.saved],
        "second": errors,
        "log": (results[0].directory / "log.txt").read_text(),
    }


def test_run_in_a_thread_is_stopped_by_a_hook_and_resumes(
    shards: dict[str, str], tmp_path: Path
) -> None:
    (raw,) = make_runs(shards, tmp_path, CASES[1:2])
    (result,) = run_ranks(run_in_thread, 1, raw)
    assert result["states"] == ["stopped", "done"]
    assert result["checkpoints"] == ["step_00000003", "step_00000004"]
    assert result["steps"] == [1, 2, 3]
    assert result["losses"] == [loss for loss, _ in curve(raw)[:3]]
    assert result["saved"] == ["step_00000003"]
    assert len(result["second"]) == 1
    assert "it is training another run" in result["second"][0]
    assert not (tmp_path / "second").exists()


def interrupt(_launch: Launch, raw: Raw) -> list[Any]:
    """Interrupt a run from its own process, as a notebook interrupts its kernel."""
    be_alone()

    class Press(megalite.Hook):
        def after_step(self, report: megalite.StepReport) -> megalite.Outcome:
            if report.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return megalite.Outcome()

    result = megalite.pretrain(
        raw | {"training": raw["training"] | {"steps": 500}}, hooks=[Press()]
    )
    return [result.state, result.checkpoint and result.checkpoint.name]


def test_run_that_is_interrupted_saves_and_returns(shards: dict[str, str], tmp_path: Path) -> None:
    (raw,) = make_runs(shards, tmp_path, CASES[1:2])
    ((state, checkpoint),) = run_ranks(interrupt, 1, raw)
    assert state == "stopped"
    assert checkpoint in ("step_00000003", "step_00000004")


def fail_then_train(_launch: Launch, raw: Raw) -> list[Any]:
    """Fail within a step under ZeRO-3, and then train."""
    import torch.nn.functional as F

    be_alone()
    linear = F.linear

    class Fail(megalite.Hook):
        def after_step(self, report: megalite.StepReport) -> megalite.Outcome:
            raise ArithmeticError("a hook's own fault")

    with pytest.raises(ArithmeticError, match="a hook's own fault"):
        megalite.pretrain(raw | {"name": "failed"}, hooks=[Fail()])
    assert F.linear is linear
    assert [t.name for t in threading.enumerate() if t.name in ("loader", "watchdog")] == []
    return train_one(raw)


def test_run_after_a_failed_run_gives_the_same_numbers(
    shards: dict[str, str], tmp_path: Path
) -> None:
    (raw,) = make_runs(shards, tmp_path, CASES[:1])
    results = run_ranks(fail_then_train, 1, raw)
    alone = raw | {"name": "alone"}
    assert results == [train_one_fresh(alone)]
    assert '"state": "failed"' in (tmp_path / "failed" / "status.json").read_text()


def train_one_fresh(raw: Raw) -> list[Any]:
    ((numbers,),) = run_ranks(train_each, 1, [raw])
    return list(numbers)


def use_model(_launch: Launch, path: str, data: str, before: Sequence[Raw]) -> list[Any]:
    """Return the results of a model after other runs of the process."""
    be_alone()
    for raw in before:
        megalite.pretrain(raw)
    model = megalite.load(path)
    return [
        model.generate("import ", 12, seed=4),
        model.generate("import ", max_new_tokens=8, temperature=0),
        model.generate("import ", 0),
        model.loss("def main():\n    return 1\n"),
        model.evaluate(data),
        model.evaluate(),
        str(model.directory),
    ]


def test_loaded_model_is_independent_of_earlier_runs(
    shards: dict[str, str], tmp_path: Path
) -> None:
    trained, other = make_runs(shards, tmp_path, [CASES[1], CASES[2]])
    run_ranks(train_each, 1, [trained])
    path = str(tmp_path / trained["name"])
    (fresh,) = run_ranks(use_model, 1, path, shards["valid"], [])
    (after,) = run_ranks(use_model, 1, path, shards["valid"], [other])
    assert fresh == after
    text, greedy, nothing, loss, measured, again, directory = fresh
    assert isinstance(text, str)
    assert greedy
    assert nothing == ""
    assert loss > 0
    assert measured == again
    assert {"loss", "perplexity", "bits_per_byte", "tokens"} <= set(measured)
    assert directory == f"{path}/checkpoints/step_00000004"
