# covers: megalite/data/examples.py megalite/data/collate.py
"""Samples for fine-tuning: order, padding, packing, targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.config import RunConfig
from megalite.data import ExampleSet, Loader, first_batches
from megalite.errors import DataError
from megalite.formats.examples import open_split, read_examples_manifest
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.models import run_config
from tests.helpers.rows import make_examples, write_jsonl

LENGTHS = [3, 20, 7, 1, 31, 12, 5, 9, 16, 2, 25]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def examples(
    task: str,
    rows: list[Any],
    model: dict[str, Any] | None = None,
    *,
    shuffle: bool = True,
    **data: Any,
) -> ExampleSet:
    folder = make_examples(write_jsonl("rows.jsonl", rows), task, model=model, **data)
    section = {"path": "rows.jsonl", "max_length": 64} | data
    config: RunConfig = run_config(
        model=model or {},
        data={"train": [], "sequence_length": section["max_length"], "seed": 1},
        finetune={"task": task, "data": section},
    )
    return ExampleSet(folder, read_examples_manifest(folder), "train", config, shuffle=shuffle)


def labelled() -> list[dict[str, Any]]:
    return [{"text": "x" * n, "label": n % 2} for n in LENGTHS]


def test_epoch_reads_every_example_once_in_another_order() -> None:
    dataset = examples("classification", labelled())
    N = len(LENGTHS)
    numbers, epochs = dataset.source_of(np.arange(3 * N))
    assert [sorted(numbers[e * N : (e + 1) * N].tolist()) for e in range(3)] == [list(range(N))] * 3
    assert len({tuple(numbers[e * N : (e + 1) * N].tolist()) for e in range(3)}) == 3
    assert epochs.tolist() == [e for e in range(3) for _ in range(N)]
    plain = examples("classification", labelled(), shuffle=False)
    assert plain.source_of(np.arange(N))[0].tolist() == list(range(N))


def test_collator_pads_texts_of_a_classifier() -> None:
    dataset = examples("classification", labelled(), shuffle=False)
    batch = dataset.batch(np.array([0, 2]), 0)
    tensors = batch.tensors
    assert tensors["input_ids"].shape == (2, 8)  # 7 and EOS
    assert tensors["input_ids"][0].tolist() == [120, 120, 120, 257, 0, 0, 0, 0]
    assert tensors["lengths"].tolist() == [4, 8]
    assert tensors["labels"].tolist() == [1, 1]
    assert "attention_mask" not in tensors  # causal attention needs none
    assert (batch.targets, batch.tokens) == (2, 12)
    both = {"architecture": "encoder_decoder", "position_embedding": "relative"}
    batch = examples("classification", labelled(), both, shuffle=False).batch(np.array([0, 2]), 0)
    assert batch.tensors["attention_mask"].sum(dim=1).tolist() == [4, 8]
    assert batch.tensors["decoder_input_ids"].tolist() == [[0], [0]]


def test_step_is_assigned_by_length_for_any_number_of_ranks() -> None:
    dataset, seen = examples("classification", labelled()), []
    for ranks in (1, 2):
        step = [
            next(
                Loader(
                    dataset,
                    global_batch_size=8,
                    micro_batch_size=2,
                    data_rank=rank,
                    data_size=ranks,
                    start=8,
                    pin_memory=False,
                )
            )
            for rank in range(ranks)
        ]
        lengths = [b.tensors["lengths"].tolist() for s in step for b in s.micro_batches]
        seen.append(sorted(n for pair in lengths for n in pair))
        for rank in step:
            tops = [int(b.tensors["lengths"].max()) for b in rank.micro_batches]
            assert tops == sorted(tops)
        assert sum(s.targets for s in step) == 8
        assert sum(s.tokens for s in step) == sum(seen[-1])
    assert seen[0] == seen[1]


def test_evaluation_reads_each_example_once() -> None:
    dataset = examples("classification", labelled(), shuffle=False)
    labels: list[int] = []
    for rank in range(2):
        for batch in first_batches(
            dataset, dataset.num_samples, micro_batch_size=4, data_rank=rank, data_size=2
        ):
            assert len(batch.tensors["labels"]) == 4
            labels += batch.tensors["labels"][batch.tensors["loss_mask"]].tolist()
    assert sorted(labels) == sorted(n % 2 for n in LENGTHS)


def test_language_modeling_targets_all_tokens_also_if_packed() -> None:
    rows = [{"text": "".join(chr(97 + n % 26) for n in range(length))} for length in LENGTHS]
    dataset = examples("language_modeling", rows, shuffle=False)
    batch = dataset.batch(np.array([0, 2]), 0).tensors
    assert batch["input_ids"][0].tolist() == [*b"abc", 0, 0, 0, 0, 0]
    assert batch["labels"][0].tolist() == [*b"bc", 257, 0, 0, 0, 0, 0]
    assert batch["loss_mask"].sum(dim=1).tolist() == [3, 7]
    packed = examples("language_modeling", rows, shuffle=False, packing=True, max_length=40)
    assert packed.num_samples < len(rows) / 2
    every = [packed.batch(np.array([n]), 0) for n in range(packed.num_samples)]
    assert sum(b.targets for b in every) == sum(LENGTHS)
    assert sum(b.tokens for b in every) == sum(LENGTHS) + len(LENGTHS)
    texts: list[str] = []
    for one in (b.tensors for b in every):
        mask = one["loss_mask"][0]
        for document in one["document_ids"][0][mask].unique().tolist():
            here = mask & (one["document_ids"][0] == document)
            texts.append(bytes(one["input_ids"][0][here].tolist()).decode())
            assert one["labels"][0][here].tolist() == [*texts[-1].encode()[1:], 257]
    assert sorted(texts) == sorted(row["text"] for row in rows)


def test_sft_targets_the_turns_of_the_assistant() -> None:
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 2
    for packing in (False, True):
        dataset = examples("sft", rows, shuffle=False, max_length=300, packing=packing)
        batch = dataset.batch(np.array([0]), 0).tensors
        targets = batch["labels"][batch["loss_mask"]].tolist()
        text = load_tokenizer("bytes").decode(targets)
        assert text == "yes<|im_end|>no<|im_end|>" * (2 if packing else 1)


def test_collator_separates_source_and_target() -> None:
    rows = [{"text": "abcd", "target": "xy"}, {"text": "ef", "target": "uvw"}]
    model = {"architecture": "encoder_decoder", "position_embedding": "relative"}
    dataset = examples("seq2seq", rows, model, shuffle=False)
    batch = dataset.batch(np.array([0, 1]), 0).tensors
    assert batch["input_ids"][:, :5].tolist() == [[*b"abcd", 257], [*b"ef", 257, 0, 0]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 3]
    assert batch["decoder_input_ids"][:, :4].tolist() == [[0, *b"xy", 257], [0, *b"uvw"]]
    assert batch["labels"][:, :4].tolist() == [[*b"xy", 257, 0], [*b"uvw", 257]]
    assert batch["loss_mask"].sum(dim=1).tolist() == [3, 4]


def test_open_split_reports_a_changed_file() -> None:
    dataset = examples("classification", labelled())
    path = dataset.tokenizer_folder.parent / "train.tokens.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="was changed; delete"):
        open_split(path.parent, dataset.manifest, "train")
