# covers: data_prep/inputs.py data_prep/streams.py
from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from data_prep.inputs import choose_part_bytes, find_streams
from data_prep.readers import kind_of
from data_prep.streams import Stream
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
    return [path for stream in find_streams(inputs) for path in stream.paths]


def test_inputs_are_files_globs_and_folders_in_order(corpus: Path) -> None:
    assert paths("b.txt", "a.jsonl") == ["b.txt", "a.jsonl"]
    assert paths("*.*") == ["a.jsonl", "b.txt"]
    assert paths("src/**/*.py") == ["src/deep/y.py", "src/z.py"]
    assert paths("src") == ["src/deep/y.py", "src/z.py"]
    assert paths(str(corpus / "src")) == [str(corpus / name) for name in paths("src")]


def test_streams_have_the_number_of_their_input(corpus: Path) -> None:
    streams = find_streams(["src/*.py", "b.txt", "a.jsonl", "src"])
    assert [(one.source, one.kind, str(one), one.parts) for one in streams] == [
        (0, "text", "src/z.py", 1),
        (1, "text", "b.txt", 1),
        (2, "jsonl", "a.jsonl", 1),
        (3, "text", "src/deep/y.py", 1),
    ]


def test_small_files_form_one_stream(corpus: Path) -> None:
    for number in range(10):
        (corpus / f"src/{number}.py").write_text("text")
    streams = find_streams(["src"], part_bytes=20)
    assert [len(stream.paths) for stream in streams] == [5, 5, 2]
    assert str(streams[2]) == "src/deep/y.py and 1 more"
    (whole,) = find_streams(["src"])
    assert (len(whole.paths), whole.size, whole.part_bytes) == (12, 48, 1 << 20)


def test_stream_survives_json(corpus: Path) -> None:
    streams = find_streams(["src", "a.jsonl"])
    assert [Stream(**one) for one in json.loads(json.dumps(list(map(asdict, streams))))] == streams


def test_identity_depends_on_the_files_and_the_size_of_parts(corpus: Path) -> None:
    def identity(name: str = "a.jsonl", part_bytes: int | None = None) -> str:
        return find_streams([name], part_bytes=part_bytes)[0].identity

    first = identity()
    assert first == identity(str(corpus / "a.jsonl")) == identity("src/../a.jsonl")
    assert len({first, identity(part_bytes=9), identity("b.txt")}) == 3
    os.utime("a.jsonl", ns=(1, 1))
    assert identity() != first
    os.utime("a.jsonl", ns=(1, 1))
    touched = identity()
    Path("a.jsonl").write_text("other")
    os.utime("a.jsonl", ns=(1, 1))
    assert identity() != touched


@pytest.mark.parametrize(
    ("total", "size"), [(0, 1 << 20), (1 << 28, 1 << 20), (3 << 29, 4 << 20), (1 << 40, 64 << 20)]
)
def test_part_size_is_a_power_of_two(total: int, size: int) -> None:
    assert choose_part_bytes(total) == size


def test_inputs_must_be_regular_files(corpus: Path) -> None:
    os.mkfifo("pipe.txt")
    with pytest.raises(
        CommandError, match=r"--input pipe.txt: not a regular file; copy a pipe or a dev"
    ):
        find_streams(["pipe.txt"])
    Path("src/broken.py").symlink_to("nowhere")
    for name in ("src", "src/broken.py"):
        with pytest.raises(CommandError, match=r"--input src/broken.py: No such file"):
            find_streams([name])


def test_links_to_folders_are_followed_once(corpus: Path) -> None:
    Path("src/loop").symlink_to(corpus / "src")
    Path("other").mkdir()
    Path("other/o.py").write_text("text")
    Path("src/link").symlink_to(corpus / "other")
    assert paths("src") == ["src/deep/y.py", "src/link/o.py", "src/z.py"]


def test_file_named_twice_is_read_once(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "megalite"):
        assert paths("src", "src/z.py", "./src/../src/z.py", "b.txt") == [
            *("src/deep/y.py", "src/z.py", "b.txt")
        ]
    assert "2 files are named by two inputs" in caplog.text


def test_name_with_brackets_may_be_a_file(corpus: Path) -> None:
    for name in ("x[1].txt", "x1.txt"):
        (corpus / name).write_text("text")
    assert paths("x[1].txt") == ["x[1].txt"]
    assert paths("x[12].txt") == ["x1.txt"]


@pytest.mark.parametrize("name", ["none.txt", "*.parquet", "empty", "none/"])
def test_input_that_does_not_exist_is_refused(name: str, corpus: Path) -> None:
    with pytest.raises(CommandError, match=r"--input .*: no file .* it \(working directory"):
        find_streams(["b.txt", name])


def test_kind_is_chosen_by_the_ending() -> None:
    kinds = {
        name: kind_of(Path(name))
        for name in ("a.jsonl", "a.JSONL.gz", "a.json.xz", "a.ndjson.bz2", "a.parquet")
    }
    assert set(kinds.values()) == {"jsonl", "parquet"}
    assert kinds["a.parquet"] == "parquet"
    assert {
        kind_of(Path(name)) for name in ("a.py", "README", "a.txt.gz", ".gz", "a.jsonl.md")
    } == {"text"}
