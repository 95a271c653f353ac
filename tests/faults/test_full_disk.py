"""A disk that fills up during training costs records, but does not end the run."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megalite import cli, files, log
from megalite.env import Launch, publish_launch
from megalite.errors import CommandError, MegaLiteError
from megalite.formats import checkpoint as disk
from megalite.observe import Recorder
from tests.helpers.ranks import run_ranks, start_ranks
from tests.helpers.runs import run_file, train


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is root's")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Fill the file system of a folder."""
    path = folder / "filler"
    with open(path, "ab", buffering=0) as file:
        for size in (4096, 1):
            with pytest.raises(OSError, match="No space left"):
                _write_on(file, size)
    return path


def _write_on(file: Any, size: int) -> None:
    while file.write(b"x" * size):
        pass


# --- kinds of writes ---


def test_append_line_writes_the_whole_line_or_nothing(small_disk: Path) -> None:
    path = small_disk / "rows.jsonl"
    rows = [json.dumps({"number": number, "text": "x" * 700}) for number in range(5)]
    for row in rows:
        files.append_line(path, row.encode())
    filler = fill(small_disk)
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            files.append_line(path, b"y" * 5000)
    assert path.read_text().splitlines() == rows
    filler.unlink()
    files.append_line(path, b"{}", sync=True)
    assert path.read_text().splitlines() == [*rows, "{}"]


def test_append_line_after_an_incomplete_line_starts_a_new_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    files.append_line(path, b'{"c": 3}')
    assert path.read_text() == '{"a": 1}\n{"b"\n{"c": 3}\n'


def test_small_file_is_replaced_on_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "status.json"
    files.replace_small(path, '{"state": "running", "pid": 12345}')
    fill(small_disk)
    for state in ("done", "a longer one, of more bytes than before: " + "x" * 200):
        files.replace_small(path, json.dumps({"state": state}))
        assert json.loads(path.read_text()) == {"state": state}
    with pytest.raises(OSError, match="No space left"):
        files.replace_small(small_disk / "other.json", "x" * 9000)


@pytest.mark.parametrize("kind", ["row", "status", "picture", "valid", "thread", "close"])
def test_record_that_cannot_be_written_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    recorder = Recorder(tmp_path, rank=0, attempt=0, total_steps=9, tensorboard=True)
    recorder.train({"step": 1, "loss": 2.0})
    view: Any = recorder._views[-1]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    for name in ("train", "valid", "picture", "close"):
        monkeypatch.setattr(view, name, full)
    monkeypatch.setattr("megalite.observe.metrics.append_line", full)
    monkeypatch.setattr("megalite.observe.status.replace_small", full)
    acts: dict[str, Callable[[], None]] = {
        "row": lambda: recorder.train({"step": 2, "loss": 2.0}),
        "status": lambda: recorder.status("running", step=2),
        "picture": lambda: recorder.picture("name", None, 2),
        "valid": lambda: recorder.valid({"step": 2, "loss": 2.0}),
        "thread": lambda: _fail_in_a_thread(full),
        "close": recorder.close,
    }
    with caplog.at_level("WARNING", logger="megalite"):
        acts[kind]()
        acts[kind]()
    assert caplog.text.count("Disk quota exceeded; the run goes on") == 1
    recorder.close()


def _fail_in_a_thread(act: Callable[[], None]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


def test_log_file_on_a_full_disk_loses_only_lines(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.setup()
    handler = log.add_file(small_disk / "log.txt")
    log.logger.info("before")
    filler = fill(small_disk)
    for number in range(100):
        log.logger.info("line %d %s", number, "x" * 100)
    log.remove(handler)
    filler.unlink()
    words = capsys.readouterr().err
    assert words.count("log.txt cannot be written: [Errno 28]") == 1
    assert "Traceback" not in words
    assert "Logging error" not in words
    assert words.count("line ") == 100
    log.logger.handlers.clear()


# --- whole runs ---


def _rank(launch: Launch, raw: dict[str, Any], full: str, words: str) -> None:
    """Train as a launcher does. The disk of `full` fills up in step 6."""
    import torch

    torch.set_num_threads(1)
    publish_launch(launch)
    handle = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)

    def inspect(step: int, *_: Any) -> None:
        if step == 6 and launch.rank == 0:
            fill(Path(full))

    cli.run_main(
        lambda: train(launch, raw, inspect=inspect), ranks=True, find_rank=lambda: launch.rank
    )


def _run(raw: dict[str, Any], full: Path, words: Path) -> list[int | None]:
    processes = start_ranks(_rank, 2, raw, str(full), str(words))
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("full_log", [False, True])
def test_run_on_a_disk_that_fills_up_completes(
    shards: dict[str, str], tmp_path: Path, small_disk: Path, full_log: bool
) -> None:
    """Records are lost from step 6 on. The checkpoints are on another disk, and complete."""
    raw = run_file(
        shards,
        small_disk,
        logging={"tensorboard": True},
        training={"eval_every": 5},
        checkpoint={"every": 8},
    )
    run = small_disk / "run"
    run.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    words = (small_disk if full_log else tmp_path) / "words.txt"
    assert _run(raw, small_disk, words) == [0, 0]
    assert "Traceback" not in words.read_text()
    if not full_log:
        assert "cannot be written: [Errno 28] No space left on device" in words.read_text()
        assert " 20/20  loss" in words.read_text()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 20)
    assert status["last_checkpoint"] == "step_00000020"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if row["kind"] == "train"]
    assert steps[:5] == [1, 2, 3, 4, 5]
    for folder in disk.published(run / "checkpoints"):
        assert disk.find_damage(folder, disk.read_manifest(folder)) == []
    assert disk.published(run / "checkpoints")[0].name == "step_00000020"


def _outcome(launch: Launch, raw: dict[str, Any]) -> str:
    try:
        train(launch, raw)
    except MegaLiteError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_start_on_a_full_disk_is_refused(
    shards: dict[str, str], tmp_path: Path, small_disk: Path
) -> None:
    raw = run_file(shards, small_disk)
    fill(small_disk)
    errors = run_ranks(_outcome, 2, raw)
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{CommandError.__name__}: the run folder ")
    assert "No space left on device; make room" in errors[0]
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
