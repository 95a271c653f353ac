# covers: megalite/evaluate/harness.py
"""lm-eval with MegaLite's model class and with its own class, on local tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.errors import CommandError
from megalite.evaluate import harness, open_model
from megalite.parallel import Grid
from tests.unit.huggingface.test_huggingface_families import exported

pytest.importorskip("lm_eval")

TEXTS = ["def main(path):", "import os, sys  # all", "class A:\n    x = 1\n", "return None"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "out"
    exported("llama", 2, path, vocab_size=258)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a multiple-choice task and a task of whole texts."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": text, "choices": [" a b", "()", text[::-1]], "answer": n % 3, "text": text * 9}
        for n, text in enumerate(TEXTS)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(path / "rows.jsonl")}}
    choice = source | {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "test_split": "train",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    rolling = source | {
        "task": "local_text",
        "output_type": "loglikelihood_rolling",
        "test_split": "train",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    for task in (choice, rolling):
        (path / f"{task['task']}.yaml").write_text(json.dumps(task))
    return path


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, args, 0) for args in arguments]


def test_log_likelihoods_equal_those_of_the_harness_own_class(grid: Grid, folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    ours = harness.make_model(open_model(folder), grid, 3)
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=2, dtype=torch.float32)
    pairs = [(text, end) for text in TEXTS for end in (" x", "def", text)]
    pairs += [("", "return"), ("trailing spaces  ", "end"), ("x" * 60, "y" * 30)]
    results = ours.loglikelihood(requests(*pairs))
    expected_results = theirs.loglikelihood(requests(*pairs))
    for (chance, likeliest), (expected, best) in zip(results, expected_results, strict=True):
        assert chance == pytest.approx(expected, abs=1e-3)
        assert likeliest == best
    texts = [(text * 9,) for text in TEXTS]
    rolled = ours.loglikelihood_rolling(requests(*texts))
    expected = theirs.loglikelihood_rolling(requests(*texts))
    assert rolled == pytest.approx(expected, abs=1e-3, rel=1e-5)


def test_harness_runs_tasks_of_local_files(grid: Grid, folder: Path, tasks: Path) -> None:
    settings: dict[str, Any] = {"path": str(tasks), "limit": None, "batch_size": 2}
    results = harness.run(open_model(folder), grid, ["local_choice", "local_text"], **settings)
    assert 0 <= results["local_choice"]["acc"] <= 1
    assert results["local_text"]["bits_per_byte"] > 0
    with pytest.raises(CommandError, match="--tasks nothing: lm-eval has no such task"):
        harness.run(open_model(folder), grid, ["nothing"], **settings)
