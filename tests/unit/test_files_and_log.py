"""Files that are complete or absent, and the exit codes of every way to leave a command."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalite import env, errors, files, log


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(
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


def test_a_reader_sees_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call that could be interrupted the file has its old content or its new."""
    path, seen = tmp_path / "a.json", []
    path.write_bytes(b"old")
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def watched(*arguments: Any, real: Callable[..., Any] = real) -> Any:
            seen.append(path.read_bytes())
            return real(*arguments)

        monkeypatch.setattr(os, name, watched)
    files.write_atomic(path, b"\x00new")
    # bytes synced, renamed over, folder synced
    assert seen == [b"old", b"old", b"\x00new"]
    assert names(tmp_path) == ["a.json"]


def test_json_round_trip_and_what_json_lacks(tmp_path: Path) -> None:
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


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_atomic(tmp_path / "none" / "a", "x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 24])
def test_hashes_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
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


# --- leaving a command ---


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that no launcher started, whose logger is as it was afterwards.

    Where another test has loaded torch, leaving is at once: here it is caught all the same.
    """
    monkeypatch.setattr(os, "_exit", sys.exit)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(key, raising=False)


def leave(result: int | BaseException | None) -> int:
    def main() -> int | None:
        if isinstance(result, BaseException):
            raise result
        return result

    with pytest.raises(SystemExit) as left:
        log.run_main(main)
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("result", "code"),
    [
        (None, 0),
        (0, 0),
        (1, 1),
        (errors.ConfigError(["first fault", "second fault"]), 2),
        (errors.DataError("x"), 2),
        (errors.CommandError("x"), 2),
        (errors.LaunchError("x"), 2),
        (errors.UserError("x"), 2),
        (errors.CheckpointError("x"), 1),
        (errors.EngineError("x"), 1),
        (errors.MegaLiteError("x"), 1),
        (errors.Stopped("x"), 75),
        (errors.Superseded("x"), 3),
        (KeyboardInterrupt(), 130),
        (SystemExit(2), 2),  # argparse
    ],
)
def test_exit_codes(result: Any, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(result) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    if isinstance(result, errors.Stopped):  # what was asked for is no error
        assert shown.err == "x\n"
    elif isinstance(result, errors.MegaLiteError):
        assert shown.err == "".join(f"error: {line}\n" for line in str(result).splitlines())


@pytest.mark.usefixtures("quiet")
def test_what_is_not_ours_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(ZeroDivisionError("a bug")) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("ZeroDivisionError: a bug\n")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("name", "code"), [("torch", 2), ("torch.gone", 1), ("langdetect", 1), ("megalite.gone", 1)]
)
def test_a_package_that_is_not_there(
    name: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(ModuleNotFoundError(f"No module named {name!r}", name=name)) == code
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) == (code == 1)
    assert (f"{sys.executable}, has no package torch; install" in shown) == (code == 2)


@pytest.mark.parametrize("ranks", [False, True])
def test_the_codes_of_a_real_process(tmp_path: Path, ranks: bool) -> None:
    """Nothing written is lost, also where the interpreter's teardown is left out."""
    program = (
        "import atexit, sys\n"
        "from pathlib import Path\n"
        "from megalite import errors, log\n"
        "def main():\n"
        "    log.logger.info('progress')\n"
        "    log.add_file(Path(sys.argv[1]))\n"
        "    sys.stdout.write('report')\n"
        "    atexit.register(sys.stdout.write, ' and teardown')\n"
        "    raise errors.Superseded('over')\n"
        f"log.run_main(main, ranks={ranks})\n"
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    command = [sys.executable, "-c", program, str(tmp_path / "log.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert done.returncode == 3
    assert done.stdout == ("report" if ranks else "report and teardown")
    assert done.stderr == "progress\nerror: over\n"
    assert (tmp_path / "log.txt").read_text().endswith(" ERROR over\n")


@pytest.mark.usefixtures("quiet")
def test_other_ranks_let_rank_0_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    launch = env.Launch(3, 4, 3, 4, "h", 1, "torchrun")
    monkeypatch.setattr(env, "find_launch", lambda: launch)
    assert leave(errors.ConfigError("everyone finds it")) == 2
    assert slept == [10.0]
    assert capsys.readouterr().err == ""
    assert leave(errors.CheckpointError("mine alone")) == 1
    assert slept == [10.0]
    assert capsys.readouterr().err == "[rank 3] error: mine alone\n"
    assert leave(errors.Stopped("asked by all, reported by one")) == 75
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("quiet")
def test_a_launch_that_cannot_be_read_is_the_commands_to_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")

    def main() -> int:
        env.find_launch()
        return 0

    with pytest.raises(SystemExit) as left:
        log.run_main(main)
    assert left.value.code == 2
    assert "half set" in capsys.readouterr().err


@pytest.mark.usefixtures("quiet")
def test_ranks_and_levels(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 2):
        log.setup(rank=rank)
        log.logger.debug("details")
        log.logger.info("plain")
        log.logger.warning("careful")
        log.logger.error("wrong")
    assert capsys.readouterr().err == (
        "plain\nwarning: careful\nerror: wrong\n[rank 2] error: wrong\n"
    )


@pytest.mark.usefixtures("quiet")
def test_the_log_file_is_appended_to(tmp_path: Path) -> None:
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


# --- what a terminal and a program that reads JSON are given ---


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


@pytest.mark.usefixtures("quiet")
def test_no_escape_reaches_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    log.logger.error("no such file \x1b[2J\x9b0m")
    log.write_report("a name \x1b[31m\n")
    shown = capsys.readouterr()
    assert shown.err == "error: no such file \\x1b[2J\\x9b0m\n"
    assert shown.out == "a name \\x1b[31m\n"


def test_reports_are_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = {"loss": math.nan, "perplexity": math.inf, "rows": [{"seconds": (1.5, -math.inf)}]}
    log.write_report(report, as_json=True)
    shown = capsys.readouterr().out
    assert shown == '{"loss": null, "perplexity": null, "rows": [{"seconds": [1.5, null]}]}\n'


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff", b""])
def test_json_that_cannot_be_read_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"deep|digits|decode|Expecting"):
        files.read_json(path)
    assert list(files.each_row(path)) == ([None] if content else [])


def test_a_file_of_another_kind_is_not_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="it holds list, not a JSON object"):
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
def test_names_from_a_file_stay_in_its_folder(name: Any, plain: bool, inner: bool) -> None:
    assert files.is_plain_name(name) == plain
    assert files.is_inner_path(name) == inner


def test_text_for_a_file_loses_only_what_begins_a_command() -> None:
    text = "form\x0cfeed \x1b[31m \x9b0m over\rwritten"
    safe = "form\x0cfeed \\x1b[31m \\x9b0m over\rwritten"
    assert log.printable(text, terminal=False) == safe
    assert "".join(log.printable_pieces(list(text), terminal=False)) == safe
