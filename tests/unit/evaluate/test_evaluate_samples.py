# covers: megalite/evaluate/samples.py
"""Text samples during training, also at a stop and with a diverged model."""

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
    """An engine whose likeliest id is 65 + (tokens so far)."""

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


def test_writer_returns_each_prompt_with_its_text(grid: Grid) -> None:
    engine = Counting()
    samples = writer(grid, engine)(lambda: False)
    assert samples == [("ab", "CDEFG"), ("c", "BCDEF")]
    assert engine.shapes == [(2, length) for length in (2, 3, 4, 5, 6)]


def test_writer_pads_for_sequence_parallelism_up_to_the_sequence_length(grid: Grid) -> None:
    engine = Counting()
    share = {"tensor": 4, "sequence": True}
    writer(grid, engine, parallel=share, data={"sequence_length": 4})(lambda: False)
    assert engine.shapes == [(2, 4)] * 5


def test_writer_draws_by_the_seed(grid: Grid) -> None:
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


def test_writer_stops_before_the_next_token(grid: Grid) -> None:
    engine, stops = Counting(), iter([False, False, True])
    assert writer(grid, engine)(lambda: next(stops)) == []
    assert len(engine.shapes) == 2


def test_writer_warns_about_a_diverged_model(grid: Grid, caplog: pytest.LogCaptureFixture) -> None:
    assert writer(grid, Counting(spoilt=2))(lambda: False) == []
    assert "no samples: the model's scores after 3 tokens are not finite" in caplog.text


class Padded(Counting):
    """An engine with ids beyond the tokenizer's 258 that have the highest scores."""

    def eval_scores(self, batch: Batch) -> Tensor:
        scores = super().eval_scores(batch)
        return torch.cat((scores, torch.full((len(scores), 42), 9.0)), dim=1)


def test_writer_never_chooses_ids_beyond_the_tokenizer(grid: Grid) -> None:
    assert writer(grid, Padded())(lambda: False) == [("ab", "CDEFG"), ("c", "BCDEF")]


class Broken(Counting):
    """An engine that raises at every text."""

    def eval_scores(self, batch: Batch) -> Tensor:
        raise IndexError("piece id is out of range")


def test_writer_warns_once_about_an_exception(grid: Grid, caplog: pytest.LogCaptureFixture) -> None:
    write = writer(grid, Broken())
    assert [write(lambda: False) for _ in range(3)] == [[], [], []]
    assert caplog.text.count("no samples: IndexError: piece id is out of range") == 1


def test_writer_adds_the_prefix_of_the_tokenizer(grid: Grid) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.begin_with_bos(True)
    config = run_config(logging={"samples": SAMPLES}, model={"vocab_size": 258})
    engine = Counting()
    Writer(config, engine, grid, Prompts(tokenizer, ["ab"], ["ab"]))(lambda: False)  # type: ignore[arg-type]
    assert engine.shapes[0] == (1, 3)


@pytest.mark.parametrize("has_copy", [True, False], ids=["copy with ends", "no folder"])
def test_writer_ends_texts_at_the_ids_of_the_initial_model(
    has_copy: bool, grid: Grid, tmp_path: Path
) -> None:
    """The run's copy of the tokenizer has these ids. The tokenizer of the data lacks them."""
    if has_copy:
        folder = tmp_path / "run" / "tokenizer"
        folder.mkdir(parents=True)
        load_tokenizer("bytes").save(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [69]}))
    logging = {"samples": SAMPLES, "directory": str(tmp_path)}
    config = run_config(logging=logging, model={"vocab_size": 258})
    engine, prompts = Counting(), Prompts(load_tokenizer("bytes"), ["ab"], ["ab"])
    samples = Writer(config, engine, grid, prompts)(lambda: False)  # type: ignore[arg-type]
    assert samples == [("ab", "CD" if has_copy else "CDEFG")]
