# covers: megalite/train/hooks/samples.py megalite/evaluate/samples.py
"""Text samples of a run are equal on all layouts, and do not change the run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.chat import ask
from megalite.env import Launch
from megalite.evaluate import Prompts, Writer, open_model, stream_texts
from megalite.evaluate.generate import Sampling
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.dist.test_finetune import tune, tuning_file
from tests.helpers.models import run_config
from tests.helpers.ranks import run_ranks
from tests.helpers.rows import write_jsonl
from tests.helpers.runs import rows, run_file, train, zero

PROMPTS = ["def main(", "import os\n", "é"]
SAMPLES = {"prompts": PROMPTS, "max_new_tokens": 12, "temperature": 1.0}
SHORT = {"steps": 6, "eval_every": 3, "eval_batches": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"deepspeed": zero(2), "model": {"hidden_dropout": 0.1}}),
    "ZeRO-3": (2, {"deepspeed": zero(3), "model": {"tie_word_embeddings": False}}),
    "ZeRO-3 tied": (2, {"deepspeed": zero(3), "model": {"tie_word_embeddings": True}}),
    "TP 2": (2, {"deepspeed": zero(1), "parallel": {"tensor": 2}}),
    "two stacks": (
        2,
        {
            "deepspeed": zero(1),
            "model": {"architecture": "encoder_decoder", "position_embedding": "relative"},
            "data": {"sequence_length": 31},
            "parallel": {"tensor": 2, "sequence": True},
        },
    ),
}


def numbers(raw: dict[str, Any]) -> list[tuple[Any, ...]]:
    train_and_valid = rows(raw, "train") + rows(raw, "valid")
    return [(row["step"], row["loss"], row.get("grad_norm")) for row in train_and_valid]


def continued(run: Path, prompts: Sequence[str | list[int]], **settings: Any) -> list[str]:
    """Return the continuations of prompts by a run's last checkpoint, as launcher/generate.py."""
    opened = open_model(run)
    sampling = Sampling(temperature=1.0, seed=1234)  # training.seed
    texts = [""] * len(prompts)
    how = {"max_new_tokens": 12, "sampling": sampling, **settings}
    for number, piece in stream_texts(opened.decoder(), opened.tokenizer, prompts, **how):
        texts[number] += piece
    return texts


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_do_not_change_the_numbers_of_a_run(
    shards: dict[str, str], tmp_path: Path, name: str
) -> None:
    ranks, sections = LAYOUTS[name]
    plain = run_file(shards, tmp_path, name="plain", training=SHORT, **sections)
    run_ranks(train, ranks, plain)
    raw = run_file(shards, tmp_path, name="told", training=SHORT, **sections)
    raw["logging"]["samples"] = SAMPLES
    run_ranks(train, ranks, raw)
    assert numbers(raw) == numbers(plain)
    samples = rows(raw, "sample")
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (step, prompt) for step in (0, 3, 6) for prompt in PROMPTS
    ]
    assert samples[0].keys() == {"kind", "time", "attempt", "step", "prompt", "text"}
    assert [row["text"] for row in samples[-3:]] == continued(tmp_path / "told", PROMPTS)


def test_samples_of_conversations_are_answers(tmp_path: Path) -> None:
    talks = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "ok"}]}
        for n in range(24)
    ]
    reviews = tmp_path / "talks"
    write_jsonl(str(reviews / "train.jsonl"), talks)
    raw = tuning_file(reviews, "sft", deepspeed=zero(1))
    raw["finetune"] |= {"task": "sft", "epochs": 2}
    del raw["finetune"]["data"]["test_split"]
    raw["logging"]["samples"] = SAMPLES | {"prompts": ["7?", "9?"], "every": 4}
    run_ranks(_tune, 1, raw)
    samples = rows(raw, "sample")
    last = rows(raw)[-1]["step"]
    assert last % 4 != 0
    assert [row["step"] for row in samples[::2]] == [*range(0, last, 4), last]
    assert [row["prompt"] for row in samples[:2]] == ["7?", "9?"]
    run = tmp_path / "runs" / "sft"
    loaded = open_model(run)  # the best epoch is the last one here
    assert loaded.folder.name == f"step_{last:08d}"
    prompts = [ask(loaded.tokenizer_folder, loaded.tokenizer, f"{n}?")[0] for n in (7, 9)]
    turn = "<|im_start|>user\n7?<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.tokenizer.decode(prompts[0]) == turn
    expected = continued(run, prompts, stop=["<|im_end|>"], controls=True)
    assert [row["text"] for row in samples[-2:]] == expected


def _tune(launch: Launch, raw: dict[str, Any]) -> None:
    tune(launch, raw, ask=ask)


def test_samples_need_the_tokenizer_of_the_data(shards: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    folder.mkdir()
    for path in sorted(Path(shards["train"]).glob("shard_*")):
        number = path.stem.removeprefix("shard_")
        shutil.copy(path, folder / f"corpus_{number}_text_document{path.suffix}")
    raw = run_file(shards | {"train": str(folder)}, tmp_path / "runs", training=SHORT)
    raw["logging"]["samples"] = SAMPLES
    with pytest.raises(
        AssertionError, match=r"DataError: logging\.samples: the shards have no tokenizer"
    ):
        run_ranks(train, 1, raw)
    assert not (tmp_path / "runs").exists()


class _Failing:
    """An engine whose forward fails on some ranks."""

    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def eval_scores(self, batch: Any) -> torch.Tensor:
        if self._fails:
            raise MemoryError("out of memory")
        return torch.zeros(len(batch.tensors["lengths"]), 258)


def _write_failing(launch: Launch, failing: list[int]) -> str:
    from megalite.parallel import start

    config = run_config(logging={"samples": SAMPLES}, model={"vocab_size": 258})
    engine: Any = _Failing(launch.rank in failing)
    prompts = Prompts(load_tokenizer("bytes"), PROMPTS, PROMPTS)
    try:
        Writer(config, engine, start(launch), prompts)(lambda: False)
    except Exception as error:
        return type(error).__name__
    return "goes on"


def test_forward_that_fails_in_a_sample_ends_every_rank() -> None:
    assert run_ranks(_write_failing, 2, [0, 1], timeout=60) == ["MemoryError"] * 2
    assert run_ranks(_write_failing, 2, [0], timeout=60) == ["MemoryError", "RuntimeError"]
