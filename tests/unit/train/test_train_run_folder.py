# covers: megalite/train/run_folder.py
"""If rank 0 cannot prepare the run folder, the start ends on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import DataError, MegaLiteError, UserError
from megalite.parallel import Grid
from megalite.train import run_folder
from megalite.train.run_folder import open_run_folder, take_over
from tests.helpers.models import run_config


class _Data:
    """Samples of shards without a tokenizer."""

    tokenizer_folder = None


@pytest.mark.parametrize("error", [ValueError("nan is not JSON"), DataError("a link")])
def test_open_run_folder_raises_any_fault_of_rank_0_on_all_ranks(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The lease is taken already, so the exit code is 1."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(run_folder, "_copy_tokenizer", fail)
    folder = tmp_path / "run"
    lease, data = take_over(folder, grid), _Data()
    with (
        pytest.raises(MegaLiteError, match=f"cannot be prepared: .*{error}") as caught,
        open_run_folder(
            folder,
            config=run_config(),
            grid=grid,
            settings={},
            train=data,
            resume_point=None,
            lease=lease,
        ),
    ):
        pass
    assert not isinstance(caught.value, UserError)
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert str(error) in status["reason"]
