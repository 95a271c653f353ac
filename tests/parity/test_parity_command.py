# covers: megalite/parity/runner.py megalite/parity/trial.py megalite/parity/layouts.py
# covers: megalite/parity/worker.py launcher/parity.py
# covers: megalite/commands/parity.py
"""The parity command, and its report of layouts with a bug."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megalite import arch
from megalite.config import load_config, parse_config
from megalite.env import has_compiler
from megalite.errors import CommandError
from megalite.parity.layouts import (
    REFERENCE,
    ParityLayout,
    ParityResume,
    resume_pairs,
    select_layouts,
)
from megalite.parity.runner import ParityRunner
from megalite.parity.trial import make_case, scaled, usable_ranks
from tests.parity import seeded

ROOT = Path(__file__).resolve().parents[2]

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "norm": "layernorm",
        "activation": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
        "hidden_dropout": 0.1,
    },
    "data": {"train": [{"path": "none"}], "sequence_length": 32, "mask_documents": True},
    "optimizer": {"lr": 3e-3},
    "training": {"steps": 1000, "global_batch_size": 64, "micro_batch_size": 4},
}
SAVED, PAIR = ParityLayout(stage=1), ParityLayout(tensor=2, stage=1)


def command(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launcher/parity.py", "--config", str(path), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ParityRunner:
    """Return a runner with a trained reference, and a run that was saved at its middle."""
    case = make_case(parse_config(TINY), tmp_path_factory.mktemp("trial"), ranks=2)
    trained = ParityRunner(case, timeout=120)
    trained.run_reference(resumes=True)
    assert trained.try_layout(SAVED, save=True).ok
    return trained


def with_bug(runner: ParityRunner, bug: str) -> ParityRunner:
    """Return the runner, whose ranks have a bug from now on."""
    runner.worker = partial(seeded.work, bug)
    return runner


@pytest.mark.slow
def test_every_layout_of_two_ranks_agrees(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    done = command(path, "--ranks", "2", "--resume", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    model = parse_config(TINY).model
    tried = select_layouts(model, 2)
    names = [layout.name for layout in [*tried, *resume_pairs(tried)]]
    assert report["ok"] is True
    assert [row["name"] for row in report["layouts"]] == names
    for row in report["layouts"][1:]:
        assert list(row) == [
            *("name", "loss_error", "grad_norm_error", "parameter", "parameter_error", "ok")
        ]
        if row["name"] != "reference, muon":
            assert row["parameter"] in arch.tensors(model)
            assert 0 <= row["parameter_error"] < (5e-2 if "bf16" in row["name"] else 1e-4)
    assert "dropout 0" in done.stderr


@pytest.mark.slow  # the test of docs/trust.md runs the command, too
def test_parity_command_prints_a_table(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY | {"model": TINY["model"] | {"num_key_value_heads": 1}}))
    done = command(path, "--ranks", "1", "--scale")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["layout", "loss", "norm", "worst", "parameter"]
    assert len(lines) == 14 + has_compiler()
    assert all("  ok  " in line for line in lines[1:])


@pytest.mark.parametrize(
    ("bug", "named"),
    [
        ("unmarked", f"{seeded.UNMARKED} (counted norm, step 1)"),
        ("biased", f"{seeded.BIASED} (output, step 2)"),
        ("perturbed", f"{seeded.PERTURBED} (weight, step 1)"),
    ],
)
def test_parity_reports_a_bug_with_its_parameter(
    runner: ParityRunner, bug: str, named: str
) -> None:
    row = with_bug(runner, bug).try_layout(PAIR)
    assert not row.ok
    assert row.parameter == named
    assert row.parameter_error is None or row.parameter_error > 1e-4


def test_parity_reports_a_norm_that_is_not_summed_over_tokens(runner: ParityRunner) -> None:
    layout = ParityLayout(tensor=2, stage=1, sequence=True)
    assert with_bug(runner, "none").try_layout(layout).ok
    row = with_bug(runner, "unsummed").try_layout(layout)
    assert not row.ok
    assert row.parameter == seeded.UNSUMMED
    assert row.parameter_error is not None
    assert row.parameter_error > 0.1


@pytest.mark.parametrize(
    ("bug", "named"),
    [
        ("dropped", f"{seeded.DROPPED} (exp_avg, step 11)"),
        ("copied", f"{seeded.COPIED} (hyper-parameters, step 11)"),
    ],
)
def test_parity_reports_a_bug_in_loading(runner: ParityRunner, bug: str, named: str) -> None:
    row = with_bug(runner, bug).try_resume(ParityResume(SAVED, ParityLayout(data=2, stage=1)))
    assert not row.ok
    assert row.parameter == named


def test_parity_agrees_without_a_bug(runner: ParityRunner) -> None:
    assert with_bug(runner, "none").try_layout(PAIR).ok
    assert with_bug(runner, "none").try_resume(ParityResume(SAVED, PAIR)).ok


def test_parity_ends_a_layout_whose_rank_dies(
    runner: ParityRunner, caplog: pytest.LogCaptureFixture
) -> None:
    row = with_bug(runner, "silent").try_layout(ParityLayout(data=2))
    assert (row.ok, row.parameter, row.loss_error) == (False, None, None)
    assert "rank 1" in caplog.text
    assert "no room left on this rank" in caplog.text


def test_parity_command_ends_with_2_at_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY | {"modle": {}}))
    done = command(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "modle" in done.stderr
    done = command(path, "--ranks", "0")
    assert done.returncode == 2


def test_parity_refuses_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert usable_ranks(None) == 2
    with pytest.raises(CommandError, match="this host has 2 GPUs"):
        usable_ranks(4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert (usable_ranks(None), usable_ranks(3)) == (4, 3)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*[!a].json")))
def test_every_layout_of_every_config_can_be_planned(
    path: Path, ranks: int, tmp_path: Path
) -> None:
    from megalite.plan import make_plan

    case = make_case(load_config(path), tmp_path, ranks=ranks, scale=True)
    tried = select_layouts(case.model, ranks)
    assert tried[0] == REFERENCE
    for layout in tried:
        config = parse_config(case.config(layout, "run"))
        plan = make_plan(config, world_size=layout.ranks, device="cpu")
        assert plan.data_parallel == layout.data
    assert len({layout.name for layout in tried}) == len(tried)
    resumed = {pair.resumed for pair in resume_pairs(tried)}
    assert all(layout in tried or layout.precision == "bf16" for layout in resumed)
    assert all(pair.saved != pair.resumed for pair in resume_pairs(tried))


def test_scaled_model_keeps_proportions_and_divisors() -> None:
    big = load_config(ROOT / "configs" / "70b.json")
    small = scaled(big.model.model_dump(), 8)
    assert small["num_attention_heads"] // small["num_key_value_heads"] == 8
    assert small["num_key_value_heads"] == 8
    assert small["intermediate_size"] / small["hidden_size"] == 28672 / 8192
    assert (small["num_hidden_layers"], small["vocab_size"] % 2) == (2, 1)
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    assert scaled(big.model.model_dump() | {"layer_types": kinds}, 8)["layer_types"] == kinds[1:]
