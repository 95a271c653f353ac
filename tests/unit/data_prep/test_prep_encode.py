# covers: data_prep/encode.py data_prep/progress.py
from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from data_prep import encoder, progress, work
from data_prep.encode import TokenizeOptions, tokenize
from data_prep.report import inspect, verify
from data_prep.train import TrainOptions, train_tokenizer
from megalite.errors import CommandError, DataError, MegaLiteError, UserError
from megalite.formats.shards import open_shards
from megalite.formats.verify import verify_folder
from megalite.tokenizers.tokenizer import ByteTokenizer, load_tokenizer

TEXTS = [f"document {number}\n" + "  some text, 中文 🎉\n" * number for number in range(1, 40)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20])
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for number, text in enumerate(TEXTS[20:]):
        (folder / f"b{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_tokenize_keeps_the_order_of_documents(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "shards"
    manifest = tokenize(TokenizeOptions([str(corpus)], "bytes", out, shard_tokens=2000))
    shards = open_shards(out, verify=True)
    assert shards.manifest == manifest
    assert verify_folder(out) == []
    tokenizer = load_tokenizer(out / manifest.tokenizer.path)
    for number, text in enumerate(TEXTS):
        ids = shards.document(number).tolist()
        assert ids[-1] == 257
        assert tokenizer.decode(ids) == text
    assert max(shard.tokens for shard in manifest.shards) <= 2000
    assert len(manifest.shards) > 5
    assert [shard.name for shard in manifest.shards[:2]] == ["shard_00000", "shard_00001"]


def test_manifest_records_how_the_shards_were_made(corpus: Path, tmp_path: Path) -> None:
    inputs = [str(corpus / "a.jsonl.gz"), str(corpus / "*.txt")]
    out = tmp_path / "out"
    tokenize(TokenizeOptions(inputs, "bytes", out, workers=2, bos=True, eos=False))
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["dtype"], manifest["vocab_size"]) == ("uint16", 258)
    assert (manifest["bos"], manifest["eos"]) == (256, None)
    assert manifest["tokenizer"] == {
        "path": "tokenizer/bytes.json",
        "sha256": ByteTokenizer().sha256,
    }
    size = sum(len(text.encode()) for text in TEXTS)
    assert (manifest["documents"], manifest["tokens"]) == (39, size + 39)
    assert [source["input"] for source in manifest["sources"]] == inputs
    assert [source["files"] for source in manifest["sources"]] == [1, 19]
    assert [source["documents"] for source in manifest["sources"]] == [20, 19]
    assert sum(source["bytes"] for source in manifest["sources"]) == size
    assert manifest["arguments"] == {
        "inputs": inputs,
        "tokenizer": "bytes",
        "text_field": "text",
        "shard_tokens": 100_000_000,
        "max_bad_records": 0,
        "bos": True,
        "eos": False,
        "deduplicate": False,
        "streaming": True,
        "lossy": False,
    }
    assert open_shards(out).document(0).tolist()[:2] == [256, ord("d")]


def test_shards_do_not_depend_on_workers_and_batches(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tokenizer(TrainOptions([str(corpus)], 300, tmp_path / "tok"))

    def shards(name: str, workers: int) -> dict[str, bytes]:
        out = tmp_path / name
        tokenize(
            TokenizeOptions(
                [str(corpus)], str(tmp_path / "tok"), out, shard_tokens=3000, workers=workers
            )
        )
        return content(out)

    one = shards("one", 1)
    assert shards("three", 3) == one
    monkeypatch.setattr(work, "_BATCH_CHARACTERS", 100)
    assert shards("batches", 2) == one


def test_long_document_has_a_shard_of_its_own(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": "x" * size}) + "\n" for size in (3, 30, 3, 4, 3))
    (tmp_path / "a.jsonl").write_text(lines)
    manifest = tokenize(
        TokenizeOptions([str(tmp_path / "a.jsonl")], "bytes", tmp_path / "out", shard_tokens=9)
    )
    assert [shard.tokens for shard in manifest.shards] == [4, 31, 9, 4]


def test_bad_records_are_counted_by_input(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": 1}\n{"text": "cut\n')
    inputs = [str(corpus), str(tmp_path / "bad.jsonl")]
    with pytest.raises(DataError, match=r"bad\.jsonl line 3: not valid JSON.*bad record 2"):
        tokenize(TokenizeOptions(inputs, "bytes", tmp_path / "out", max_bad_records=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "corpus"]
    manifest = tokenize(TokenizeOptions(inputs, "bytes", tmp_path / "out", max_bad_records=2))
    assert [source.bad_records for source in manifest.sources] == [0, 2]
    assert manifest.documents == 40


def test_tokenize_leaves_nothing_after_an_error(corpus: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    cases: list[tuple[TokenizeOptions, type[MegaLiteError], str]] = [
        (TokenizeOptions([str(corpus)], "bytes", taken), CommandError, "is not an empty folder"),
        (
            TokenizeOptions([str(corpus)], "bytes", taken / "file"),
            CommandError,
            "is not an empty folder",
        ),
        (TokenizeOptions([str(corpus)], "none", tmp_path / "o"), DataError, "no tokenizer none"),
        (TokenizeOptions(["none"], "bytes", tmp_path / "o"), CommandError, "no file matches"),
        (
            TokenizeOptions([str(corpus)], "bytes", taken / "file" / "below"),
            CommandError,
            "is below .*file, a file; name another",
        ),
    ]
    (tmp_path / "empty.jsonl").write_text("")
    empty = TokenizeOptions([str(tmp_path / "empty.jsonl")], "bytes", tmp_path / "new" / "o")
    cases.append((empty, DataError, "no document in"))
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            tokenize(options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "empty.jsonl", "taken"]
    assert (taken / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [".", "", "..", "/"])
def test_output_that_is_not_a_new_folder_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(CommandError, match="is not a new folder"):
        tokenize(TokenizeOptions([str(corpus)], "bytes", Path(name)))


@pytest.mark.parametrize("there", [True, False])
def test_output_that_is_a_link_is_refused_first(corpus: Path, tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(CommandError, match="is a link"):
        tokenize(TokenizeOptions([str(corpus)], "bytes", tmp_path / "out"))
    assert not (tmp_path / ".out.work").exists()


def test_output_may_be_an_empty_folder(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    tokenize(TokenizeOptions([str(corpus)], "bytes", tmp_path / "out"))
    assert verify_folder(tmp_path / "out") == []


def test_tokenizer_without_eos_needs_no_eos_option(corpus: Path, tmp_path: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={character: id for id, character in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    with pytest.raises(UserError, match="has no EOS token; use another, or pass --no-eos"):
        tokenize(TokenizeOptions([str(corpus)], str(path), tmp_path / "out"))
    manifest = tokenize(TokenizeOptions([str(corpus)], str(path), tmp_path / "out", eos=False))
    assert (manifest.tokens, manifest.eos) == (sum(len(text.encode()) for text in TEXTS), None)


def test_progress_is_logged(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    encoding = encoder.Encoder.encode

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return encoding(*arguments)

    monkeypatch.setattr(encoder.Encoder, "encode", slow)
    with caplog.at_level("INFO", "megalite"):
        tokenize(TokenizeOptions([str(corpus)], "bytes", tmp_path / "out"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("so far: ")
    assert re.match(r"all: 39 documents; encoded 0\.0 MB in \d+\.\d\d s \(", lines[-1])


def test_verify_and_inspect_report(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tokenize(TokenizeOptions([str(corpus)], "bytes", out, shard_tokens=5000))
    assert verify(out) == 0
    assert "39 documents" in capsys.readouterr().out
    assert inspect(out, None) == 0
    summary = capsys.readouterr().out
    assert "documents          39\n" in summary
    assert open_shards(out).fingerprint in summary
    assert inspect(out, 3) == 0
    assert capsys.readouterr().out == TEXTS[3] + "\n"
    with pytest.raises(CommandError, match=r"has 39 documents, 0 to 38"):
        inspect(out, 39)
    (out / "shard_00000.bin").write_bytes(b"")
    assert verify(out) == 1
    assert "shard_00000.bin: got 0 bytes" in capsys.readouterr().out
