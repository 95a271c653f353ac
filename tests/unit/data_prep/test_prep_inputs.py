from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.inputs import find_units, kind_of
from megalite.errors import CommandError


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.jsonl", "src/z.py", "src/deep/y.py", "src/.git/config", "src/.hidden"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "empty").mkdir()
    return tmp_path


def paths(*inputs: str) -> list[str]:
    return [unit.path for unit in find_units(inputs)]


def test_files_globs_and_folders_come_in_order(corpus: Path) -> None:
    assert paths("b.txt", "a.jsonl") == ["b.txt", "a.jsonl"]
    assert paths("*.*") == ["a.jsonl", "b.txt"]
    assert paths("src/**/*.py") == ["src/deep/y.py", "src/z.py"]
    assert paths("src") == ["src/deep/y.py", "src/z.py"]
    assert paths(str(corpus / "src")) == [str(corpus / name) for name in paths("src")]


def test_units_know_their_input(corpus: Path) -> None:
    units = find_units(["src/*.py", "hf:org/name:test", "a.jsonl"])
    assert [(unit.source, unit.kind, str(unit)) for unit in units] == [
        (0, "text", "src/z.py"),
        (1, "hub", "hf:org/name:test"),
        (2, "jsonl", "a.jsonl"),
    ]


def test_a_file_named_twice_is_read_once(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "megalite"):
        assert paths("src", "src/z.py", "./src/../src/z.py", "b.txt") == [
            *("src/deep/y.py", "src/z.py", "b.txt")
        ]
    assert "2 files are named by two inputs" in caplog.text


def test_a_name_with_brackets_is_a_file_first(corpus: Path) -> None:
    for name in ("x[1].txt", "x1.txt"):
        (corpus / name).write_text("text")
    assert paths("x[1].txt") == ["x[1].txt"]
    assert paths("x[12].txt") == ["x1.txt"]


@pytest.mark.parametrize("name", ["none.txt", "*.parquet", "empty", "none/"])
def test_an_input_that_names_nothing_is_refused(name: str, corpus: Path) -> None:
    with pytest.raises(CommandError, match=r"--input .*: no file .* it \(working directory"):
        find_units(["b.txt", name])


def test_the_ending_tells_the_kind() -> None:
    found = {
        name: kind_of(Path(name))
        for name in ("a.jsonl", "a.JSONL.gz", "a.json.zst", "a.ndjson", "a.parquet")
    }
    assert set(found.values()) == {"jsonl", "parquet"}
    assert found["a.parquet"] == "parquet"
    assert {
        kind_of(Path(name)) for name in ("a.py", "README", "a.txt.gz", ".gz", "a.jsonl.md")
    } == {"text"}
