# covers: megalite/evaluate/samples.py
"""What happens to samples where a run is asked to stop, or its model has diverged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.data import Batch
from megalite.evaluate import Prompts, Writer
from megalite.parallel import Grid
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.models import run_config

SAMPLES = {"prompts": ["ab", "c"], "max_new_tokens": 5, "temperature": 0}


class Counting:
    """An engine that scores id 65 + (tokens so far) highest."""

    def __init__(self, spoilt: int = -1) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._spoilt = spoilt

    def eval_scores(self, batch: Batch) -> Tensor:
        self.shapes.append(tuple(batch.tensors["input_ids"].shape))
        scores = torch.zeros(len(batch.tensors["lengths"]), 258)
        for row, length in zip(scores, batch.tensors["lengths"].tolist(), strict=True):
            row[65 + length] = 1
        return scores / (len(self.shapes) != self._spoilt)


def writer(grid: Grid, engine: Any, **sections: Any) -> Writer:
    config = run_config(logging={"samples": SAMPLES}, model={"vocab_size": 258}, **sections)
    prompts = SAMPLES["prompts"]
    return Writer(config, engine, grid, Prompts(load_tokenizer("bytes"), prompts, prompts))


def test_each_prompt_with_its_text(grid: Grid) -> None:
    engine = Counting()
    found = writer(grid, engine)(lambda: False)
    assert found == [("ab", "CDEFG"), ("c", "BCDEF")]
    assert engine.shapes == [(2, length) for length in (2, 3, 4, 5, 6)]


def test_shapes_are_those_that_ranks_share_and_no_longer_than_a_sample(grid: Grid) -> None:
    engine = Counting()
    share = {"tensor": 4, "sequence": True}
    writer(grid, engine, parallel=share, data={"sequence_length": 4})(lambda: False)
    assert engine.shapes == [(2, 4)] * 5


def test_samples_are_drawn_by_the_seed(grid: Grid) -> None:
    def written(seed: int) -> list[tuple[str, str]]:
        samples = {"prompts": SAMPLES["prompts"], "max_new_tokens": 5}
        config = run_config(
            logging={"samples": samples}, model={"vocab_size": 258}, training={"seed": seed}
        )
        assert config.logging.samples is not None
        assert config.logging.samples.temperature == 0.8
        prompts = Prompts(load_tokenizer("bytes"), samples["prompts"], samples["prompts"])
        engine: Any = Counting()
        return Writer(config, engine, grid, prompts)(lambda: False)

    assert written(1) == written(1) != written(2)


def test_a_stop_is_heeded_before_the_next_token(grid: Grid) -> None:
    engine, asked = Counting(), iter([False, False, True])
    assert writer(grid, engine)(lambda: next(asked)) == []
    assert len(engine.shapes) == 2


def test_a_model_that_has_diverged_ends_no_run(
    grid: Grid, caplog: pytest.LogCaptureFixture
) -> None:
    assert writer(grid, Counting(spoilt=2))(lambda: False) == []
    assert "no samples: the model's scores after 3 tokens are not finite" in caplog.text


class Padded(Counting):
    """Scores rows beyond the tokenizer's 258 ids, the last of them highest."""

    def eval_scores(self, batch: Batch) -> Tensor:
        scores = super().eval_scores(batch)
        return torch.cat((scores, torch.full((len(scores), 42), 9.0)), dim=1)


def test_rows_beyond_the_tokenizer_are_never_chosen(grid: Grid) -> None:
    assert writer(grid, Padded())(lambda: False) == [("ab", "CDEFG"), ("c", "BCDEF")]


class Broken(Counting):
    """Fails at every text, as a library might."""

    def eval_scores(self, batch: Batch) -> Tensor:
        raise IndexError("piece id is out of range")


def test_a_fault_in_a_sample_ends_no_run_and_is_said_once(
    grid: Grid, caplog: pytest.LogCaptureFixture
) -> None:
    write = writer(grid, Broken())
    assert [write(lambda: False) for _ in range(3)] == [[], [], []]
    assert caplog.text.count("no samples: IndexError: piece id is out of range") == 1


def test_samples_begin_as_the_tokenizer_begins_texts(grid: Grid) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.begin_with_bos(True)
    config = run_config(logging={"samples": SAMPLES}, model={"vocab_size": 258})
    engine = Counting()
    Writer(config, engine, grid, Prompts(tokenizer, ["ab"], ["ab"]))(lambda: False)  # type: ignore[arg-type]
    assert engine.shapes[0] == (1, 3)


@pytest.mark.parametrize("kept", [True, False], ids=["kept ends", "no folder"])
def test_samples_end_as_the_model_that_the_run_started_from(
    kept: bool, grid: Grid, tmp_path: Path
) -> None:
    """The run's copy of the tokenizer holds those ends; the tokenizer of the data lacks them."""
    if kept:
        folder = tmp_path / "run" / "tokenizer"
        folder.mkdir(parents=True)
        load_tokenizer("bytes").save(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [69]}))
    logging = {"samples": SAMPLES, "directory": str(tmp_path)}
    config = run_config(logging=logging, model={"vocab_size": 258})
    engine, prompts = Counting(), Prompts(load_tokenizer("bytes"), ["ab"], ["ab"])
    found = Writer(config, engine, grid, prompts)(lambda: False)  # type: ignore[arg-type]
    assert found == [("ab", "CD" if kept else "CDEFG")]
