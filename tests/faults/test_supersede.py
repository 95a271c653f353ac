"""If a run is started twice, the second start continues, and the first ends with code 3."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalite.env import Launch, publish_launch
from megalite.errors import CommandError, MegaLiteError
from megalite.formats import checkpoint as disk
from tests.helpers.ranks import run_ranks, start_ranks
from tests.helpers.runs import rows, run_file, train

EVERY = 2


def _rank(launch: Launch, raw: dict[str, Any], delay: float, request: dict[str, Any]) -> None:
    """Train, and end with a launcher's exit code. The engine's construction takes `delay` s."""
    import torch

    module: Any = importlib.import_module("megalite.train.session")
    torch.set_num_threads(1)
    publish_launch(launch)
    make = module._make_engine

    def slowly(*arguments: Any) -> Any:
        time.sleep(delay)
        return make(*arguments)

    module._make_engine = slowly
    code = 0
    try:
        train(launch, raw, **request)
    except MegaLiteError as error:
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def _start(raw: dict[str, Any], world: int, delay: float = 0.0, **request: Any) -> list[Any]:
    return start_ranks(_rank, world, raw, delay, request)


def _newest(root: Path) -> int:
    return max((disk.step_of(folder) for folder in disk.published(root)), default=0)


def _wait(true: Callable[[], bool], what: str, processes: list[Any]) -> None:
    deadline = time.monotonic() + 90
    while not true():
        assert time.monotonic() < deadline, what
        assert all(process.is_alive() for process in processes), what
        time.sleep(0.005)


def _codes(processes: list[Any]) -> list[int | None]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def _status(raw: dict[str, Any]) -> dict[str, Any]:
    run = Path(raw["logging"]["directory"]) / raw["name"]
    status: dict[str, Any] = json.loads((run / "status.json").read_text())
    return status


def _endless(shards: dict[str, str], folder: Path, **checkpoint: Any) -> dict[str, Any]:
    return run_file(
        shards,
        folder,
        training={"steps": 10**6, "eval_every": 0},
        schedule={"name": "constant"},
        checkpoint={"every": EVERY, "keep": 1, **checkpoint},
    )


def _trial(
    shards: dict[str, str], folder: Path, draw: random.Random, delay: float, **checkpoint: Any
) -> None:
    """Start a run, and start it again at a random moment, often during a save."""
    raw = _endless(shards, folder, **checkpoint)
    root = folder / "run" / "checkpoints"
    first = _start(raw, 2)
    second = list[Any]()
    try:
        _wait(lambda: _newest(root) >= 2 * EVERY, "no checkpoint of the first start", first)
        until = time.monotonic() + draw.random()
        while time.monotonic() < until and not list(root.glob(".staging_*")):
            pass
        second = _start(raw, 2, delay)
        assert _codes(first) == [3, 3]
        reached = _newest(root)
        _wait(lambda: _newest(root) > reached, "no checkpoint of the second start", second)
        status = _status(raw)
        assert (status["state"], status["attempt"]) in (("running", 1), ("saving", 1))
        assert status["pid"] == second[0].pid
        os.kill(status["pid"], signal.SIGTERM)
        assert _codes(second) == [75, 75]
    finally:
        for process in (*first, *second):
            process.kill()
    assert (_status(raw)["state"], _status(raw)["attempt"]) == ("stopped", 1)
    (resumed,) = [row for row in rows(raw, "event") if row["name"] == "resume"]
    assert 2 * EVERY <= resumed["step"] <= reached
    assert not list(root.glob("bad_*"))
    for path in disk.published(root):
        assert disk.find_damage(path, disk.read_manifest(path)) == []


def test_second_start_supersedes_the_first(shards: dict[str, str], tmp_path: Path) -> None:
    _trial(shards, tmp_path, random.Random(1), delay=1.0)
    assert (tmp_path / "run" / "status.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("checkpoint", [{"keep": 1}, {"keep": 5, "background": True}])
def test_second_start_supersedes_the_first_at_any_moment(
    shards: dict[str, str], tmp_path: Path, checkpoint: dict[str, Any]
) -> None:
    draw = random.Random(2)
    for trial in range(10):
        _trial(shards, tmp_path / str(trial), draw, delay=4.0, **checkpoint)
    assert len(list(tmp_path.glob("*/run/status.json"))) == 10


def test_refused_start_does_not_end_the_running_one(shards: dict[str, str], tmp_path: Path) -> None:
    """It is refused because of the run file, the command, or the content of the run folder."""
    raw = _endless(shards, tmp_path)
    root = tmp_path / "run" / "checkpoints"
    first = _start(raw, 1)
    try:
        _wait(lambda: _newest(root) >= EVERY, "no checkpoint", first)
        lease = (root / ".lease.json").read_bytes()
        refused: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"data": {**raw["data"], "seed": 5}}, {}),
            ({"training": {**raw["training"], "steps": 1}}, {}),
            ({"model": {**raw["model"], "hidden_size": 64}}, {}),
            ({}, {"resume": "never"}),
            ({}, {"resume": str(tmp_path / "nowhere")}),
            ({}, {"allow_change": ("nothing",)}),
            ({"data": {**raw["data"], "train": [{"path": str(tmp_path)}]}}, {}),
        ]
        for sections, request in refused:
            assert _codes(_start({**raw, **sections}, 1, **request)) == [2], (sections, request)
        assert (root / ".lease.json").read_bytes() == lease
        reached = _newest(root)
        _wait(lambda: _newest(root) > reached, "the first start does not go on", first)
        assert _status(raw)["attempt"] == 0
        os.kill(first[0].pid, signal.SIGTERM)
        assert _codes(first) == [75]
    finally:
        first[0].kill()


def _refused(launch: Launch, raw: dict[str, Any]) -> None:
    with pytest.raises(CommandError, match=r"the run folder .* cannot be written: .*Not a dir"):
        train(launch, raw)


def test_folder_that_cannot_be_created_is_named_in_the_error(
    shards: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    raw = run_file(shards, tmp_path / "file" / "runs")
    run_ranks(_refused, 2, raw)
    assert (tmp_path / "file").read_text() == ""


def test_status_json_is_that_of_the_last_start_if_it_failed(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """All checkpoints are damaged. The status has the attempt number of the new start."""
    raw = _endless(shards, tmp_path) | {"training": {"steps": EVERY, "eval_every": 0}}
    raw["training"] |= {"global_batch_size": 8, "micro_batch_size": 2}
    root = tmp_path / "run" / "checkpoints"
    assert _codes(_start(raw, 1)) == [0]
    (root / f"step_{EVERY:08d}" / "config.json").write_text("{}")
    assert _codes(_start(raw, 1)) == [1]
    status = _status(raw)
    assert (status["state"], status["attempt"]) == ("failed", 1)
    assert "every checkpoint" in status["reason"]
    assert [path.name for path in root.glob("bad_*")] == [f"bad_{EVERY:08d}"]
