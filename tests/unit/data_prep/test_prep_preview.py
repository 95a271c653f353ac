# covers: data_prep/preview.py
"""The quick check of the first rows of a run's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.preview import preview
from megalite.config import RunConfig
from megalite.errors import DataError
from tests.helpers.models import run_config
from tests.helpers.rows import write_jsonl

ROW = {"text": "x", "label": "a"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tuning(**data: Any) -> RunConfig:
    finetune = {"task": "classification", "data": {"path": "a.jsonl", "max_length": 16, **data}}
    return run_config(finetune=finetune)


def test_preview_names_splits_and_columns() -> None:
    write_jsonl("a.jsonl", [ROW])
    assert preview(tuning()) == "a.jsonl: train with text, label"


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        ([], {}, "the train split has no row"),
        ([{"text": "x"}], {}, "no field 'label'"),
        ([ROW], {"valid_split": "valid"}, "split 'valid': no such split"),
    ],
)
def test_preview_refuses_rows_that_cannot_be_used(
    rows: list[dict[str, Any]], data: dict[str, Any], message: str
) -> None:
    write_jsonl("a.jsonl", rows)
    with pytest.raises(DataError, match=message):
        preview(tuning(**data))


def test_preview_accepts_a_bad_row_if_some_are_allowed() -> None:
    write_jsonl("a.jsonl", [{"text": "x"}, ROW])
    assert preview(tuning(max_bad_rows=1)).startswith("a.jsonl: train")
