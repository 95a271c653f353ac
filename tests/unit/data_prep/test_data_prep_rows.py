# covers: data_prep/rows.py data_prep/row_files.py data_prep/row.py
from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megalite import hub
from megalite.errors import DataError
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.rows import ROWS, decode_texts, make_examples, open_examples, write_jsonl


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    return caplog


# ---- sources of rows

_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def written(kind: str) -> bytes:
    if kind == "json":
        return json.dumps(ROWS, indent=1).encode()
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        lines = [mark.join(("label", "text", "more"))]
        lines += [mark.join((str(row["label"]), f'"{row["text"]}"', "x")) for row in ROWS]
        return ("\ufeff" + "\r\n".join(lines)).encode()
    return ("\n\n".join(map(json.dumps, ROWS)) + "\n").encode()


@pytest.mark.parametrize("packed", _PACKERS)
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_files_of_every_kind_give_the_same_examples(kind: str, packed: str) -> None:
    Path(f"a.{kind}{packed}").write_bytes(_PACKERS[packed](written(kind)))
    manifest, splits = open_examples(make_examples(f"a.{kind}{packed}"))
    assert decode_texts(splits["train"]) == [row["text"] for row in ROWS]
    assert manifest.labels == ("0", "1", "2")
    assert splits["train"].labels is not None
    assert splits["train"].labels.tolist() == [row["label"] for row in ROWS]
    assert splits["train"].rows.tolist() == list(range(20))
    assert splits["train"].info.counts == {"0": 7, "1": 7, "2": 6}
    assert manifest.task == "classification"
    assert manifest.tokenizer_sha256 == load_tokenizer("bytes").sha256


def test_parquet_and_saved_sets_give_the_same_examples() -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, "a.parquet", row_group_size=3)
    saved = datasets.Dataset(table)
    saved.save_to_disk("saved")
    datasets.DatasetDict({"train": saved, "test": saved.select(range(6))}).save_to_disk("both")
    expected = open_examples(make_examples("a.parquet"))[1]["train"].info
    assert open_examples(make_examples("saved"))[1]["train"].info == expected
    splits = open_examples(make_examples("both", test_split="test"))[1]
    assert splits["train"].info == expected
    assert len(splits["test"]) == 6
    with pytest.raises(DataError, match="no split 'valid'; it has train, test"):
        make_examples("both", valid_split="valid")
    with pytest.raises(DataError, match="no column 'texts'; it has text, label"):
        make_examples("saved", text_column="texts")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text;label\na;0\n", "it has text;label; separate columns by commas .* not by ';'"),
        (b'"one, two\nthree",good\n', "the first row must name the columns"),
        ("text,label\ncaf\xe9,1\n".encode("latin-1"), "byte 0xe9 after .*caf' is not UTF-8; save"),
    ],
)
def test_table_of_another_program_is_described(content: bytes, message: str) -> None:
    Path("a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        make_examples("a.csv")
    assert "\n" not in str(caught.value)


def test_hub_data_set_names_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    feature = datasets.ClassLabel(names=["neg", "pos"])
    loaded = datasets.Dataset.from_list([{"text": "a", "label": n} for n in (1, 0, -1)])
    loaded = loaded.cast_column("label", feature)
    calls = []

    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        return loaded

    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    manifest, splits = open_examples(make_examples("org/name@small", max_bad_rows=1))
    assert manifest.labels == ("neg", "pos")
    assert splits["train"].labels is not None
    assert splits["train"].labels.tolist() == [1, 0]
    assert splits["train"].info.bad_rows == 1
    assert calls == [("org/name", "small", "train")]

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="no network; local files work offline"):
        make_examples("org/name")
    monkeypatch.setattr(hub, "unreachable", lambda: "no route")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"org/name: no such file .*reached \(no route\)") as caught:
        make_examples("org/name@small")
    assert time.monotonic() - began < 1  # the library tries for half a minute
    assert "\nhf download org/name --repo-type dataset --local-dir name\n" in str(caught.value)


@pytest.mark.parametrize("name", ["reviews.txt", "reviews.xlsx", "a/b/c", "d/none.text"])
def test_missing_file_is_not_taken_for_a_hub_data_set(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    Path("d").mkdir()
    with pytest.raises(DataError, match=f"{name}: there is no such file or folder"):
        make_examples(name)


def test_folder_has_a_file_for_each_split() -> None:
    write_jsonl("d/train.jsonl", ROWS)
    Path("d/dev.csv").write_text("text,label\nx,1\n")
    Path("d/test.ndjson.gz").write_bytes(gzip.compress(json.dumps(ROWS[1]).encode()))
    Path("d/README.md").write_text("")
    splits = open_examples(make_examples("d", valid_split="dev", test_split="test.ndjson.gz"))[1]
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 20,
        "valid": 1,
        "test": 1,
    }
    with pytest.raises(DataError, match=r"no such split; it has dev.csv, test.*gz, train.jsonl$"):
        make_examples("d", valid_split="valid")
    Path("d/train.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="2 files have the name"):
        make_examples("d")
    assert len(open_examples(make_examples("d", train_split="train.jsonl"))[1]["train"]) == 20


def test_find_source_reports_paths_without_data(tmp_path: Path) -> None:
    Path("a.txt").write_text("x")
    write_jsonl("a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"a\.txt: got an unknown ending; use one of"):
        make_examples("a.txt")
    for path in ("gone.jsonl.gz", str(tmp_path / "gone"), "./gone"):
        with pytest.raises(DataError, match="there is no such file or folder"):
            make_examples(path)
    with pytest.raises(DataError, match=r"a.jsonl: split 'test': no such split; it has train"):
        make_examples("a.jsonl", test_split="test")
    assert len(open_examples(make_examples("a.jsonl", train_split="all"))[1]["train"]) == 20


def test_damaged_files_are_reported() -> None:
    Path("a.jsonl.gz").write_bytes(gzip.compress(written("jsonl"))[:-9])
    Path("a.csv").write_text('text,label\n"x,1\n')
    Path("b.csv").write_text("text,label,text\n")
    Path("a.json").write_text("[1,")
    Path("a.parquet").write_text("PAR1")
    for name in ("a.jsonl.gz", "a.csv", "a.json", "a.parquet"):
        with pytest.raises(DataError, match=f"{name}: cannot be read to its end"):
            make_examples(name)
    with pytest.raises(DataError, match="several columns are named 'text'"):
        make_examples("b.csv")


# ---- bad rows

FAULTS: list[tuple[Any, str]] = [
    ("{", "not readable JSON"),
    ("[1]", "not a JSON object"),
    ({"label": 1}, "no field 'text'; it has label"),
    ({"text": 5, "label": 1}, "'text' is 5, not text"),
    ({"text": None, "label": 1}, "'text' is None, not text"),
    ({"text": " \n", "label": 1}, "'text' is empty"),
    ({"text": "a\0", "label": 1}, "NUL at character 1"),
    ('{"text": "\\ud800", "label": 1}', "half a surrogate pair"),
    ({"text": "a", "label": None}, "'label' is None, neither an integer nor a name"),
    ({"text": "a", "label": 0.5}, "'label' is 0.5"),
    ({"text": "a", "label": ""}, "'label' is ''"),
]


@pytest.mark.parametrize(("row", "reason"), FAULTS)
def test_bad_row_is_reported_and_counted(
    row: Any, reason: str, log: pytest.LogCaptureFixture
) -> None:
    write_jsonl("a.jsonl", [*ROWS[:2], row, ROWS[2]])
    with pytest.raises(
        DataError, match=r"a.jsonl line 3: .*; 1 bad row, .*max_bad_rows 0"
    ) as error:
        make_examples("a.jsonl")
    assert reason in str(error.value)
    split = open_examples(make_examples("a.jsonl", max_bad_rows=1))[1]["train"]
    assert (split.info.bad_rows, split.rows.tolist()) == (1, [0, 1, 3])
    assert "a.jsonl line 3" in log.text
    assert reason in log.text


def test_bad_rows_are_counted_by_split_and_a_few_named(log: pytest.LogCaptureFixture) -> None:
    write_jsonl("d/train.jsonl", [*ROWS, *["x"] * 8])
    write_jsonl("d/test.jsonl", [ROWS[0], {"text": "a", "label": 7}, *["x"] * 7])
    split = open_examples(make_examples("d", test_split="test", max_bad_rows=8))[1]
    assert [one.info.bad_rows for one in split.values()] == [8, 8]
    assert log.text.count("omitted") == 10
    assert log.text.count("label '7' is none of '0', '1', '2'") == 1
    with pytest.raises(DataError, match=r"8 bad rows, more than .* 7"):
        make_examples("d", test_split="test", max_bad_rows=7)
    write_jsonl("e.jsonl", ["x"] * 3000)
    with pytest.raises(DataError, match=r"line 1: .*; 1,001 or more bad rows, more than .* 0"):
        make_examples("e.jsonl")


def test_csv_rows_of_another_length_are_bad_rows() -> None:
    Path("a.csv").write_text("text,label\na,1\nb\nc,2,3\nd,0\n")
    split = open_examples(make_examples("a.csv", max_bad_rows=2))[1]["train"]
    assert decode_texts(split) == ["a", "d"]
    with pytest.raises(DataError, match=r"row 1 \(to line 3\): 1 fields, not 2"):
        make_examples("a.csv")
    assert csv.field_size_limit() > 1 << 31


def test_split_without_examples_is_refused() -> None:
    write_jsonl("d/train.jsonl", ROWS)
    write_jsonl("d/test.jsonl", [])
    with pytest.raises(DataError, match="test split has no example"):
        make_examples("d", test_split="test")
    with pytest.raises(DataError, match="train split has no example"):
        make_examples("d", "language_modeling", train_split="test", tokenizer=None)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder"])
def test_rows_may_be_unlabelled_for_predictions(kind: str, log: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": None}, {"text": "c", "label": 0}]
    rows.append({"text": "d", "label": -1})

    def written(place: str, values: list[dict[str, Any]]) -> str:
        table = pa.Table.from_pylist(values)
        if kind == "folder":
            datasets.Dataset(table).save_to_disk(place)
            return place
        path = f"{place}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        elif kind == "csv":
            lines = [",".join("" if v is None else str(v) for v in row.values()) for row in values]
            Path(path).write_text("\n".join([",".join(values[0]), *lines]) + "\n")
        else:
            write_jsonl(path, values)
        return path

    options = {"labels": ["0", "1"], "unlabelled": True}
    train = "train" if kind != "folder" else "None"
    split = open_examples(make_examples(written("some", rows), train_split=train, **options))[1][
        "train"
    ]
    assert split.labels is not None
    assert split.labels.tolist() == [1, -1, 0, -1]
    assert split.info.counts == {"0": 1, "1": 1}
    bare = written("none", [{"text": row["text"]} for row in rows])
    split = open_examples(make_examples(bare, train_split=train, **options))[1]["train"]
    assert split.labels is not None
    assert split.labels.tolist() == [-1] * 4
    assert "no example of" not in log.text
    with pytest.raises(DataError, match="label"):
        make_examples(bare, train_split=train, labels=["0", "1"])
