# covers: data_prep/examples.py data_prep/split_arrays.py data_prep/row_splits.py
# covers: data_prep/tasks/base.py data_prep/tasks/texts.py data_prep/tasks/classification.py
# covers: data_prep/tasks/language_modeling.py data_prep/tasks/seq2seq.py data_prep/tasks/sft.py
# covers: megalite/formats/examples.py
from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from data_prep import examples, row_files, rows
from data_prep.examples import prepare
from megalite.errors import DataError
from megalite.formats.examples import read_examples_manifest
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.models import run_config
from tests.helpers.rows import ROWS, decode_texts, make_examples, open_examples, write_jsonl

EOS = 257
GIVEN = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    return caplog


# ---- labels


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([10, 9, 2.0, "-1"], ("-1", "2", "9", "10")),
        (["b", "a", 1], ("1", "a", "b")),
        ([True, False], ("False", "True")),
    ],
)
def test_labels_are_sorted(values: list[Any], labels: tuple[str, ...]) -> None:
    write_jsonl("a.jsonl", [{"text": "x", "label": label} for label in values])
    manifest, splits = open_examples(make_examples("a.jsonl"))
    assert manifest.labels == labels
    assert splits["train"].labels is not None
    names = [labels[n] for n in splits["train"].labels.tolist()]
    assert names == [str(int(x)) if isinstance(x, float) else str(x) for x in values]


def test_labels_may_be_set_in_the_run_file() -> None:
    write_jsonl("a.jsonl", ROWS)
    manifest, splits = open_examples(make_examples("a.jsonl", labels=["2", "0", "1", "more"]))
    assert manifest.labels == ("2", "0", "1", "more")
    assert splits["train"].info.counts == {"2": 6, "0": 7, "1": 7, "more": 0}
    with pytest.raises(
        DataError, match="label '2' is none of '0', '1', the labels of the training rows"
    ):
        make_examples("a.jsonl", labels=["0", "1"])
    with pytest.raises(DataError, match="remove the repeated one"):
        make_examples("a.jsonl", labels=["0", "0"])
    write_jsonl("b.jsonl", [ROWS[0]] * 3)
    with pytest.raises(DataError, match="training split are '0'; a classification needs two"):
        make_examples("b.jsonl")
    manifest, _ = open_examples(
        make_examples("b.jsonl", labels=["1", "0"])
    )  # a label may have no rows if set
    assert manifest.splits["train"].counts == {"1": 0, "0": 3}


# ---- fractions


def test_fractions_are_chosen_by_the_seed() -> None:
    write_jsonl("a.jsonl", ROWS)
    splits = open_examples(make_examples("a.jsonl", test_fraction=0.2, valid_fraction=0.1, seed=5))[
        1
    ]
    order = np.random.Generator(np.random.PCG64(5)).permutation(20)
    expected = {"test": order[:4], "valid": order[4:6], "train": order[6:]}
    for name, split in splits.items():
        assert split.rows.tolist() == sorted(expected[name].tolist())
        assert decode_texts(split) == [f"text {row}" for row in split.rows]
    assert sorted(splits) == ["test", "train", "valid"]
    other = open_examples(make_examples("a.jsonl", test_fraction=0.2, valid_fraction=0.1, seed=6))[
        1
    ]
    assert other["test"].rows.tolist() != splits["test"].rows.tolist()


def test_fraction_may_be_used_with_a_split_and_must_have_a_row() -> None:
    write_jsonl("d/train.jsonl", ROWS)
    write_jsonl("d/test.jsonl", ROWS[:3])
    splits = open_examples(make_examples("d", valid_fraction=0.25, test_split="test"))[1]
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [15, 5, 3]
    for shares, name in (((0.01, None), "valid"), ((0.5, 0.49), "train")):
        with pytest.raises(DataError, match=f"of the 20 rows of 'train' none is left for {name}"):
            make_examples("d", valid_fraction=shares[0], test_fraction=shares[1])
    write_jsonl("none.jsonl", [])
    with pytest.raises(DataError, match="the train split has no example"):
        make_examples("none.jsonl", valid_fraction=0.1)


# ---- tokens of each task


def wordpieces(folder: str) -> str:
    names = ["[UNK]", "[CLS]", "[SEP]", "text", "a", "b", *map(str, range(20))]
    backend: Any = tokenizers.Tokenizer(
        models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    Path(folder).mkdir()
    backend.save(f"{folder}/tokenizer.json")
    return folder


def test_classification_adds_eos_and_bos_for_encoders(
    log: pytest.LogCaptureFixture,
) -> None:
    write_jsonl("a.jsonl", ROWS)
    split = open_examples(make_examples("a.jsonl", max_length=6))[1]["train"]
    assert split.loss_masks is None
    assert split.ids(3).tolist() == [*b"text ", EOS]
    assert split.info.cut == 20
    assert log.text.count("20 of 20 examples (100.0 %)") == 1
    whole = open_examples(make_examples("a.jsonl", max_length=7))[1]["train"]
    assert (whole.info.cut, whole.ids(3).tolist()) == (10, [*b"text 3", EOS])
    words = wordpieces("words")
    encoder = {"architecture": "encoder"}
    split = open_examples(make_examples("a.jsonl", tokenizer=words, model=encoder))[1]["train"]
    assert split.ids(3).tolist() == [1, 3, 9, 2]
    split = open_examples(make_examples("a.jsonl", tokenizer=words))[1]["train"]
    assert split.ids(3).tolist() == [3, 9, 2]
    with pytest.raises(DataError, match="max_length 2: BOS and EOS leave no room"):
        make_examples("a.jsonl", tokenizer=words, model=encoder, max_length=2)


def test_language_modeling_makes_all_tokens_targets() -> None:
    write_jsonl("a.jsonl", ["", {"t": "abc"}, {"t": "abcd"}])
    split = open_examples(
        make_examples("a.jsonl", "language_modeling", text_column="t", max_length=4)
    )[1]["train"]
    assert [split.ids(n).tolist() for n in (0, 1)] == [[*b"abc", EOS], [*b"abcd"]]
    assert split.loss_mask(0).tolist() == [True] * 4
    assert (split.info.cut, split.labels, split.info.counts) == (1, None, {})


def test_seq2seq_makes_the_target_a_target_of_the_loss() -> None:
    write_jsonl("a.jsonl", [{"text": "abcdef", "target": "xy"}, {"text": "a", "target": "uvwxyz"}])
    split = open_examples(make_examples("a.jsonl", "seq2seq", max_length=4, max_target_length=3))[
        1
    ]["train"]
    assert split.ids(0).tolist() == [*b"abc", EOS, *b"xy", EOS]
    assert split.ids(1).tolist() == [*b"a", EOS, *b"uvw"]
    assert split.loss_mask(0).tolist() == [False] * 4 + [True] * 3
    assert split.loss_mask(1).tolist() == [False] * 2 + [True] * 3
    assert split.info.cut == 2


def test_text_without_tokens_is_a_bad_row() -> None:
    backend: Any = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="b"))
    backend.normalizer = tokenizers.normalizers.Replace("x", "")
    Path("t").mkdir()
    backend.save("t/tokenizer.json")
    write_jsonl("a.jsonl", [{"text": "a"}, {"text": "x"}])
    with pytest.raises(DataError, match="line 2: the tokenizer makes no token of its text"):
        make_examples("a.jsonl", "language_modeling", tokenizer="t")


def test_sft_renders_and_truncates_conversations(log: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
    write_jsonl("a.jsonl", [{"messages": turns}, {"messages": turns * 2}])
    folder = make_examples("a.jsonl", "sft", max_length=70)
    split = open_examples(folder)[1]["train"]
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert decode_texts(split)[0] == f"{head}answer<|im_end|>\n"
    marked = split.ids(0)[split.loss_mask(0)].tolist()
    assert bytes(marked).decode() == "answer<|im_end|>"
    assert (split.lengths.tolist(), split.info.cut) == ([len(head) + 17, 70], 1)
    assert "generation" in (folder / "tokenizer" / "chat_template.jinja").read_text()
    assert (folder / "tokenizer" / "bytes.json").is_file()
    with pytest.raises(DataError, match=f"none of the .* among the first {len(head)}"):
        make_examples("a.jsonl", "sft", max_length=len(head))


def test_sft_renders_prompt_and_response_as_two_turns() -> None:
    write_jsonl("a.jsonl", [{"q": "x", "a": "y"}, {"q": "x", "a": " "}, {"q": "x"}])
    template = Path("own.jinja")
    template.write_text("<{% for m in messages %}{{ '|' * loop.index0 + m.content }}{% endfor %}")
    options: dict[str, Any] = {"prompt_column": "q", "response_column": "a", "max_bad_rows": 2}
    split = open_examples(make_examples("a.jsonl", "sft", chat_template=GIVEN, **options))[1][
        "train"
    ]
    assert decode_texts(split) == ["x;y;"]
    assert split.loss_mask(0).tolist() == [True, False, True, False]
    # finetune.data.chat_template has priority.
    section = {"path": "a.jsonl", "max_length": 9, "chat_template": "own.jinja"} | options
    config = run_config(finetune={"task": "sft", "data": section})
    folder = prepare(config, tokenizer="bytes", chat_template=GIVEN)
    assert decode_texts(open_examples(folder)[1]["train"]) == ["<x|y"]
    assert (folder / "tokenizer" / "chat_template.jinja").read_bytes() == template.read_bytes()


# ---- tokenizers, and the folder


def test_tokenizer_is_trained_if_there_is_none() -> None:
    write_jsonl("a.jsonl", [{"text": f"hello world {n}", "label": n % 2} for n in range(30)])
    folder = make_examples("a.jsonl", tokenizer=None, model={"vocab_size": 285}, valid_fraction=0.5)
    manifest, splits = open_examples(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert (tokenizer.vocab_size, manifest.vocab_size) == (285, 285)
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    row = splits["valid"].rows[0]
    assert splits["valid"].ids(0).tolist() == [*tokenizer.encode(f"hello world {row}"), 2]
    fewer, _ = open_examples(make_examples("a.jsonl", tokenizer=None, model={"vocab_size": 9000}))
    assert 260 < fewer.vocab_size < 400  # as many as the text yields


def test_tokenizer_of_the_data_has_priority_over_the_models() -> None:
    write_jsonl("a.jsonl", ROWS)
    section = {"path": "a.jsonl", "max_length": 64, "tokenizer": "bytes"}
    config = run_config(finetune={"task": "classification", "data": section})
    assert read_examples_manifest(prepare(config, tokenizer="gone")).vocab_size == 258


def test_prepare_makes_a_folder_once_for_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl("a.jsonl", ROWS)
    first = make_examples("a.jsonl")
    assert first.parent == Path("data/finetune")
    words = wordpieces("words")
    others = [
        make_examples("a.jsonl", max_length=32),
        make_examples("a.jsonl", seed=2),
        make_examples("a.jsonl", tokenizer=words),
        make_examples("a.jsonl", "language_modeling"),
        make_examples("a.jsonl", cache="b", max_length=16),
    ]
    chats = write_jsonl("c.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}])
    others += [
        make_examples(chats, "sft"),
        make_examples(chats, "sft", chat_template="{% generation %}{{ 1 }}{% endgeneration %}"),
    ]
    os.utime("a.jsonl", ns=(1, 1))
    others.append(make_examples("a.jsonl"))
    assert len({first.name, *(other.name for other in others)}) == 9
    assert make_examples("a.jsonl", cache="b").name == others[-1].name
    monkeypatch.setattr(examples, "ExampleMaker", None)
    assert make_examples("a.jsonl") == others[-1]
    (first / "manifest.json").unlink()
    os.utime("a.jsonl", ns=(1, 1))
    (others[-1] / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="delete the folder"):
        make_examples("a.jsonl")


def test_prepare_at_the_same_time_shares_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl("a.jsonl", ROWS)
    both, original = threading.Barrier(2), examples.ExampleMaker.make

    def together(self: Any, folder: Path, arguments: dict[str, Any]) -> None:
        original(self, folder, arguments)
        both.wait(30)

    monkeypatch.setattr(examples.ExampleMaker, "make", together)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(make_examples("a.jsonl"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert [path.name for path in folders[0].parent.iterdir()] == [folders[0].name]
    assert len(open_examples(folders[0])[1]["train"]) == 20


def test_prepare_leaves_nothing_of_a_failure() -> None:
    write_jsonl("a.jsonl", ["x"])
    with pytest.raises(DataError, match="1 bad row,"):
        make_examples("a.jsonl")
    assert not Path("data").exists()


def test_rows_are_tokenized_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "_BATCH", 3)
    for module in (rows, row_files):
        monkeypatch.setattr(module, "BATCH", 7)
    pq.write_table(pa.Table.from_pylist(ROWS), "a.parquet")
    assert decode_texts(open_examples(make_examples("a.parquet"))[1]["train"]) == [
        row["text"] for row in ROWS
    ]
