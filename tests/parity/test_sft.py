"""Instruction tuning compared with an explicit loss, with the chat template of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_prep.chat import CHATML
from megalite.data import ExampleSet, first_batches
from megalite.formats.examples import read_examples_manifest
from tests.dist.test_finetune import numbers, tune, tuning_file
from tests.helpers.models import loss_of, make_model, run_config
from tests.helpers.ranks import run_ranks
from tests.helpers.rows import make_examples, write_jsonl
from tests.helpers.runs import zero
from tests.unit.data_prep.test_data_prep_chat import conversations, folder

transformers = pytest.importorskip("transformers")

__all__ = ["folder"]  # the fixture: a tokenizer


@pytest.mark.parametrize("packing", [False, True])
def test_sft_loss_equals_that_of_transformers_masks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    turns = conversations()
    data: dict[str, Any] = {"max_length": 512, "packing": packing}
    path = write_jsonl("talks.jsonl", [{"messages": one} for one in turns])
    examples = make_examples(path, "sft", tokenizer=folder, **data)
    section = {"vocab_size": 400, "max_position_embeddings": 512, "num_key_value_heads": 2}
    config = run_config(
        model=section,
        data={"train": [], "sequence_length": 512},
        finetune={"task": "sft", "data": {"path": path} | data},
    )
    model = make_model(config.model, spread=0.3).eval()
    dataset = ExampleSet(examples, read_examples_manifest(examples), "train", config, shuffle=False)
    total, targets = 0.0, 0
    with torch.no_grad():
        for batch in first_batches(
            dataset, dataset.num_samples, micro_batch_size=3, data_rank=0, data_size=1
        ):
            total += float(loss_of(model, batch.tensors))
            targets += batch.targets
    wanted, counted = 0.0, 0
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    for one in turns:
        rendered = oracle.apply_chat_template(one, chat_template=CHATML, **options)
        ids, mask = (torch.tensor(rendered[key]) for key in ("input_ids", "assistant_masks"))
        with torch.no_grad():
            logits = model.logits(ids[None, :-1])[0].double()
        each = F.cross_entropy(logits, ids[1:], reduction="none")
        wanted += float(each[mask[1:].bool()].sum())
        counted += int(mask[1:].sum())
    assert targets == counted
    assert total == pytest.approx(wanted, rel=1e-5)


TASKS: dict[str, dict[str, Any]] = {
    "sft": {"task": "sft", "label_smoothing": 0.1},
    "seq2seq": {"task": "seq2seq", "label_smoothing": 0.1},
    "language_modeling": {"task": "language_modeling"},
}


@pytest.mark.parametrize("task", TASKS)
def test_sft_gives_the_same_numbers_on_any_layout(tmp_path: Path, task: str) -> None:
    talks = tmp_path / "talks"
    rows = [
        {"messages": one, "text": one[0]["content"] * 2, "target": one[-1]["content"]}
        for one in conversations() + conversations()[::-1]
    ]
    write_jsonl(str(talks / "train.jsonl"), rows)
    write_jsonl(str(talks / "test.jsonl"), rows[:7])
    model = {"architecture": "encoder_decoder", "position_embedding": "relative"}
    model = model if task == "seq2seq" else {}
    model |= {"max_position_embeddings": 256}

    def file(name: str, **sections: Any) -> dict[str, Any]:
        raw = tuning_file(talks, name, model=model, **sections)
        data = raw["finetune"]["data"] | {"max_length": 256, "valid_fraction": None}
        data["packing"] = task == "language_modeling"
        raw["finetune"] = {"data": data, "epochs": 2, "eval_train": True, **TASKS[task]}
        raw["training"] |= {"global_batch_size": 4, "micro_batch_size": 2}
        return raw

    plain = file("plain")
    run_ranks(_reference, 1, plain)
    wanted = numbers(plain)
    assert wanted[-1]["loss"] < wanted[0]["train_loss"] + 0.5
    assert len(wanted) == 3
    layouts = {
        "tp2": ({"tensor": 2}, zero(1)),
        "sequence": ({"tensor": 2, "sequence": True}, zero(3)),
    }
    for name, (parallel, deepspeed) in layouts.items():
        raw = file(name, parallel=parallel, deepspeed=deepspeed)
        run_ranks(tune, 2, raw)
        for row, other in zip(numbers(raw), wanted, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), (name, row, other)


def _reference(launch: Any, raw: dict[str, Any]) -> None:
    tune(launch, raw, engine="reference")
