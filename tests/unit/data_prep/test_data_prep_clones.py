# covers: data_prep/clones.py
"""Folders with data sets of the hub have the splits of datasets.load_dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.clones import has_card, split_of
from data_prep.inputs import find_streams
from megalite.errors import CommandError, DataError
from tests.helpers.rows import make_examples, open_examples, write_jsonl

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': neg
          '1': pos
---
# Reviews
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def parquet(path: str, rows: int, first: str = "") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "text": [f"{first}{path} {n}" for n in range(rows)],
        "label": [n % 2 for n in range(rows)],
    }
    pq.write_table(pa.table(columns), path)


def clone(card: str = CARD) -> None:
    for split, shards in (("train", 2), ("test", 1)):
        for n in range(shards):
            parquet(f"clone/data/{split}-{n:05d}-of-{shards:05d}.parquet", 6)
    Path("clone/README.md").write_text(card)


def sizes(path: str, **data: Any) -> dict[str, int]:
    return {
        name: len(split) for name, split in open_examples(make_examples(path, **data))[1].items()
    }


@pytest.mark.parametrize("card", [CARD, "", "# Reviews\n"])
def test_clone_has_the_splits_of_load_dataset(card: str) -> None:
    clone(card)
    known = {name: len(rows) for name, rows in datasets.load_dataset("clone").items()}
    assert known == {"train": 12, "test": 6}
    assert sizes("clone", test_split="test") == known
    assert sizes("clone/data", test_split="test") == known
    labels = open_examples(make_examples("clone"))[0].labels
    assert labels == (("neg", "pos") if card == CARD else ("0", "1"))
    with pytest.raises(DataError, match="clone: split 'valid': no such split; it has train, test"):
        make_examples("clone", valid_split="valid")


def test_data_card_overrides_names_of_files() -> None:
    clone(CARD.replace("data/train-*", "data/test-*"))
    parquet("clone/train.parquet", 3)
    assert sizes("clone") == {"train": 6}


@pytest.mark.parametrize("name", ["val", "dev", "valid", "validation"])
def test_clone_with_a_folder_for_each_split_is_read(name: str) -> None:
    parquet("d/train/0000.parquet", 4)
    parquet("d/train/0001.parquet", 3)
    parquet(f"d/{name}/a.parquet", 2)
    assert sizes("d", valid_split="validation") == {"train": 7, "valid": 2}


@pytest.mark.parametrize("name", ["val", "dev", "valid"])
def test_split_has_the_librarys_name_and_the_files(name: str) -> None:
    write_jsonl("d/train.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    write_jsonl(f"d/{name}.jsonl", [{"text": "c", "label": 1}])
    assert sizes("d", valid_split=name) == sizes("d", valid_split="validation")
    with pytest.raises(DataError, match=f"no such split; it has {min(name, 'train')}"):
        make_examples("d", valid_split="gone")


def test_clone_configuration_is_chosen_by_name() -> None:
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("en", "de")
    )
    clone(card + "---\n")
    parquet("clone/en/a.parquet", 4)
    parquet("clone/de/a.parquet", 5)
    assert sizes("clone@de") == {"train": 5}
    with pytest.raises(DataError, match=r"name one, as clone@CONFIG"):
        make_examples("clone")


def test_single_shard_of_several_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    clone()
    assert sizes("clone/data/train-00001-of-00002.parquet") == {"train": 6}
    assert "one of several files of a split; name its folder for all" in caplog.text


def paths(*inputs: str) -> list[str]:
    return [path for stream in find_streams(inputs) for path in stream.paths]


def test_corpus_does_not_mix_splits() -> None:
    clone("")
    message = r"--input clone: .* splits test, train, .*; name one, as --input hf:clone:train"
    with pytest.raises(CommandError, match=message):
        paths("clone")
    assert paths("clone/data/train-*.parquet") == [
        f"clone/data/train-0000{n}-of-00002.parquet" for n in range(2)
    ]
    assert paths("hf:clone:train") == ["clone:train"]
    for name in ("data/extra-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"):
        parquet(f"other/{name}", 1)
    with pytest.raises(CommandError, match="splits extra, test"):
        paths("other")
    for name in ("web", "books"):
        parquet(f"sources/{name}-00000-of-00001.parquet", 1)
    assert len(paths("sources")) == 2
    write_jsonl("lines/train.jsonl.gz", [])
    write_jsonl("lines/dev.jsonl", [])
    with pytest.raises(CommandError, match="splits train, validation"):
        paths("lines")


def test_corpus_refuses_a_data_card() -> None:
    parquet("one/data/train-00000-of-00001.parquet", 3)
    Path("one/README.md").write_text(CARD)
    with pytest.raises(
        CommandError, match=r"README.md is a data card, .* give --input hf:one:train"
    ):
        paths("one")
    Path("one/README.md").write_text("# Notes\n")
    assert len(paths("one")) == 2


def test_corpus_of_source_code_may_contain_data_files() -> None:
    for name in ("a.py", "b.py", "c.py", "tests/d.py"):
        Path("src", name).parent.mkdir(parents=True, exist_ok=True)
        Path("src", name).write_text("x")
    write_jsonl("src/tests/train.jsonl", [])
    write_jsonl("src/tests/test.jsonl", [])
    assert len(paths("src")) == 6


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("dev/a.jsonl", "validation"),
        ("my_val.jsonl", "validation"),
        ("TEST.csv", "test"),
        ("en/training/0.parquet", "train"),
        ("evaluation.json", "test"),
        ("latest.jsonl", None),
        ("trainers.jsonl", None),
        ("part-00000-of-00003.parquet", "part"),
    ],
)
def test_split_of_agrees_with_the_library(path: str, split: str | None) -> None:
    assert split_of(path) == split


def test_has_card_requires_yaml_with_files_or_features(tmp_path: Path) -> None:
    for text, known in (
        (CARD, True),
        ("---\nlicense: mit\ndataset_info:\n---\n", True),
        ("---\nlicense: mit\n---\nconfigs:\n", False),
        ("configs:\n", False),
        ("", False),
    ):
        (tmp_path / "README.md").write_text(text)
        assert has_card(tmp_path) == known
    assert not has_card(tmp_path / "gone")
