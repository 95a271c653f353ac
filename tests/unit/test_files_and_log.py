# covers: megalite/files.py megalite/log.py
"""Atomic files, logs and reports."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalite import files, log


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_write_that_fails_keeps_the_old_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: str | None,
    step: str,
    fault: BaseException,
) -> None:
    path = tmp_path / "status.json"
    if old is not None:
        path.write_text(old)

    def fail(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(fault)):
        files.write_atomic(path, "new and much longer")
    assert names(tmp_path) == ([] if old is None else ["status.json"])
    assert old is None or path.read_text() == old


def test_reader_sees_the_old_or_the_new_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content is checked at every call that could be interrupted."""
    path, seen = tmp_path / "a.json", []
    path.write_bytes(b"old")
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def watched(*arguments: Any, real: Callable[..., Any] = real) -> Any:
            seen.append(path.read_bytes())
            return real(*arguments)

        monkeypatch.setattr(os, name, watched)
    files.write_atomic(path, b"\x00new")
    # the calls are the sync of the file, the rename, and the sync of the folder
    assert seen == [b"old", b"old", b"\x00new"]
    assert names(tmp_path) == ["a.json"]


def test_json_file_is_read_as_written_and_never_has_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"é": [1, 2.5, None, True], "big": 2**60}
    files.write_json(path, value)
    assert files.read_json(path) == value
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            files.write_json(path, {"loss": bad})
    assert files.read_json(path) == value
    assert names(tmp_path) == ["a.json"]
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="utf-8"):
        files.read_json(path)


def test_write_atomic_needs_an_existing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_atomic(tmp_path / "none" / "a", "x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 24])
def test_hash_does_not_depend_on_the_chunk_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(files, "_CHUNK", 8)
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_publish_renames_and_never_replaces(tmp_path: Path) -> None:
    staging, final = tmp_path / ".staging", tmp_path / "step"
    staging.mkdir()
    (staging / "a").write_text("a")
    files.publish(staging, final)
    assert names(tmp_path) == ["step"]
    assert (final / "a").read_text() == "a"
    staging.mkdir()
    (staging / "b").write_text("b")
    with pytest.raises(OSError, match="not empty"):
        files.publish(staging, final)
    assert names(final) == ["a"]
    assert names(staging) == ["b"]


def test_publish_syncs_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(files, "sync_directory", lambda path: calls.append(path.name))
    monkeypatch.setattr(os, "rename", lambda a, b: calls.append(f"{a.name} -> {b.name}"))
    files.publish(tmp_path / "s", tmp_path / "f")
    assert calls == ["s", "s -> f", tmp_path.name]


def test_log_of_rank_0_has_infos_and_that_of_others_only_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank in (0, 2):
        log.setup(rank=rank)
        log.logger.debug("details")
        log.logger.info("plain")
        log.logger.warning("careful")
        log.logger.error("wrong")
    assert capsys.readouterr().err == (
        "plain\nwarning: careful\nerror: wrong\n[rank 2] error: wrong\n"
    )


def test_log_file_is_appended_to(tmp_path: Path) -> None:
    log.setup()
    for message in ("first start", "second start"):
        handler = log.add_file(tmp_path / "log.txt")
        log.logger.info("%s", message)
        log.remove(handler)
    log.logger.info("after the end")
    log.remove(None)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO first start", "INFO second start"]
    assert not any(isinstance(h, logging.FileHandler) for h in log.logger.handlers)


# --- output for a terminal, and for a program that reads JSON ---


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain, tab\tand\nlines\r\n", "plain, tab\tand\nlines\r\n"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("safe\roverwritten", r"safe\x0doverwritten"),
        ("\x9b31m \x7f \0", r"\x9b31m \x7f \x00"),
        ("half \ud83d", r"half \ud83d"),
        ("大规模 😀 naïve", "大规模 😀 naïve"),
    ],
)
def test_printable_text_has_no_commands(text: str, safe: str) -> None:
    assert log.printable(text) == safe
    assert "".join(log.printable_pieces(list(text))) == safe


def test_log_and_report_escape_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    log.logger.error("no such file \x1b[2J\x9b0m")
    log.write_report("a name \x1b[31m\n")
    shown = capsys.readouterr()
    assert shown.err == "error: no such file \\x1b[2J\\x9b0m\n"
    assert shown.out == "a name \\x1b[31m\n"


def test_json_report_has_null_for_nan_and_inf(capsys: pytest.CaptureFixture[str]) -> None:
    report = {"loss": math.nan, "perplexity": math.inf, "rows": [{"seconds": (1.5, -math.inf)}]}
    log.write_report(report, as_json=True)
    shown = capsys.readouterr().out
    assert shown == '{"loss": null, "perplexity": null, "rows": [{"seconds": [1.5, null]}]}\n'


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff", b""])
def test_invalid_json_raises_value_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"deep|digits|decode|Expecting"):
        files.read_json(path)
    assert list(files.each_row(path)) == ([None] if content else [])


def test_read_object_refuses_lists_and_pipes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="it contains list, not a JSON object"):
        files.read_object(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        files.read_json(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "plain", "inner"),
    [
        ("model-00001-of-00002.safetensors", True, True),
        ("tokenizer/bytes.json", False, True),
        *((name, False, False) for name in ("", ".", "..", "../x", "/etc/passwd", "a/../../b")),
        *((name, False, False) for name in ("a//b", "a\0b", "a\x1bb", "half \ud83d", "a\\b", None)),
    ],
)
def test_plain_names_and_inner_paths_do_not_leave_their_folder(
    name: Any, plain: bool, inner: bool
) -> None:
    assert files.is_plain_name(name) == plain
    assert files.is_inner_path(name) == inner


def test_printable_text_for_a_file_keeps_form_feeds() -> None:
    text = "form\x0cfeed \x1b[31m \x9b0m over\rwritten"
    safe = "form\x0cfeed \\x1b[31m \\x9b0m over\rwritten"
    assert log.printable(text, terminal=False) == safe
    assert "".join(log.printable_pieces(list(text), terminal=False)) == safe
