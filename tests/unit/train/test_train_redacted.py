# covers: megalite/checkpoint/start.py megalite/config/secrets.py
"""Checkpoints of earlier versions, which wrote "[redacted]" into config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megalite import files
from megalite.checkpoint import describe_run, describe_start
from megalite.commands import finetune
from megalite.config import load_stored
from megalite.errors import CommandError, ConfigError
from megalite.parallel import Grid
from tests.helpers.checkpoints import find, publish, reseal
from tests.helpers.models import run_config


@pytest.fixture
def redacted(tmp_path: Path) -> Path:
    folder = publish(tmp_path / "run" / "checkpoints", 5, run_config())
    raw = files.read_json(folder / "config.json")
    raw["model"]["norm"] = "[redacted]"
    files.write_json(folder / "config.json", raw)
    reseal(folder)
    return folder


def test_resume_takes_a_redacted_value_from_the_run_file(redacted: Path, grid: Grid) -> None:
    point = find(grid, redacted.parent, run_config())
    assert point is not None
    assert (point.folder, point.changes) == (redacted, {})


@pytest.mark.parametrize(
    "open_it",
    [
        lambda folder, _: load_stored(folder / "config.json"),
        lambda folder, _: describe_start(folder),
        lambda folder, grid: find(
            grid, folder.parent.parent / "other", run_config(), init_from=str(folder)
        ),
    ],
    ids=["eval", "describe", "init_from"],
)
def test_redacted_value_without_a_run_file_is_an_error_that_names_its_key(
    redacted: Path, grid: Grid, open_it: Callable[[Path, Grid], object]
) -> None:
    with pytest.raises((CommandError, ConfigError), match=r"model\.norm: an earlier version"):
        open_it(redacted, grid)


@pytest.mark.parametrize("stated", [{"norm": "layernorm"}, {}], ids=["stated", "not stated"])
def test_finetuning_takes_a_redacted_value_from_its_run_file(
    stated: dict[str, str], redacted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher reads the model from the run's checkpoints before it starts."""
    run = redacted.parent.parent
    raw = {
        "name": run.name,
        "logging": {"directory": str(run.parent)},
        "model": {"num_hidden_layers": 2, **stated},
        "data": {"sequence_length": 8},
        "finetune": {"task": "language_modeling", "data": {"path": "rows.jsonl", "max_length": 8}},
        "optimizer": {"lr": 1e-3},
        "training": {"global_batch_size": 4, "micro_batch_size": 2},
    }
    files.write_json(tmp_path / "tune.json", raw)
    norms: list[str] = []
    monkeypatch.setattr(
        "megalite.parity.dry_run.report_dry_run", lambda config, *_: norms.append(config.model.norm)
    )
    command = ["finetune.py", "--config", str(tmp_path / "tune.json"), "--dry-run"]
    monkeypatch.setattr("sys.argv", command)
    if stated:
        finetune.main()
        assert norms == ["layernorm"]
        assert describe_run(run, stated)
    else:
        with pytest.raises(CommandError, match=r"model\.norm: an earlier version"):
            finetune.main()
