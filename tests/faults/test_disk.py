"""A full disk, and damaged checkpoints and shards, are reported and never ignored."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import MegaLiteError
from megalite.formats import checkpoint as disk
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, run_file, train


def _outcome(launch: Any, raw: dict[str, Any]) -> str:
    try:
        train(launch, raw)
    except MegaLiteError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is root's")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_with_room_for_one_checkpoint_fails_the_run_at_its_end(
    shards: dict[str, str], tmp_path: Path, small_disk: Path
) -> None:
    """Until then the run continues without the second checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    (small_disk / "checkpoints").mkdir()
    (run / "checkpoints").symlink_to(small_disk / "checkpoints")
    raw = run_file(
        shards,
        tmp_path,
        model={"hidden_size": 64, "intermediate_size": 192},
        training={"eval_every": 0},
        checkpoint={"every": 5, "keep": 2},
    )
    errors = run_ranks(_outcome, 2, raw)
    assert [type_of.split(":")[0] for type_of in errors] == ["NoSpace", "NoSpace"]
    assert "make room, or lower checkpoint.keep" in errors[0]
    assert [row["step"] for row in rows(raw)] == [*range(1, 21)]
    others = ("start", "straggler")  # a busy host may slow a rank down
    named = [(row["name"], row["step"]) for row in rows(raw, "event") if row["name"] not in others]
    assert named == [("checkpoint", 5), ("unsaved", 10), ("unsaved", 15), ("failed", 20)]
    (checkpoint,) = disk.published(run / "checkpoints")
    assert checkpoint.name == "step_00000005"
    assert disk.find_damage(checkpoint, disk.read_manifest(checkpoint)) == []
    assert not list((run / "checkpoints").glob(".staging_*"))
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["last_checkpoint"]) == ("failed", "step_00000005")


class Canary:
    """An object that creates a file if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def _flip(path: Path, _mark: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path, _mark: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _remove(path: Path, _mark: Path) -> None:
    path.unlink()


def _empty(path: Path, _mark: Path) -> None:
    path.write_bytes(b"")


def _plant(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Canary(mark)))


DAMAGES = {"flipped": _flip, "cut": _cut, "missing": _remove, "empty": _empty, "canary": _plant}


@pytest.fixture(scope="module")
def finished(
    shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """Return a run file, and the folder of its finished run with checkpoints at 10 and 20."""
    folder = tmp_path_factory.mktemp("finished")
    raw = run_file(shards, folder, checkpoint={"every": 10, "keep": 5})
    run_ranks(train, 2, raw)
    return raw, folder / "run"


KINDS = (
    *("manifest.json", "config.json", "ledger.json", "tokenizer/tokenizer.json"),
    *("model-*.safetensors", "exp_avg-*.safetensors", "exp_avg_sq-*.safetensors"),
)


def _files(folder: Path, kind: str) -> Path:
    files = sorted(folder.glob(kind)) or sorted(p for p in folder.glob("tokenizer/*"))
    return files[0]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoint_is_reported_and_the_previous_one_is_used(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, kind: str
) -> None:
    """The run resumes to the same numbers after each kind of damage."""
    raw, run = finished
    for name, damage in DAMAGES.items():
        directory, mark = tmp_path / name, tmp_path / f"{name}.ran"
        shutil.copytree(run, directory / "run", symlinks=True)
        again = raw | {"logging": raw["logging"] | {"directory": str(directory)}}
        root = directory / "run" / "checkpoints"
        damage(_files(root / "step_00000020", kind), mark)
        assert run_ranks(_outcome, 1, again) == [""], name
        assert (root / "bad_00000020").is_dir(), name
        assert (root / "step_00000020").is_dir(), name
        (resumed,) = [row for row in rows(again, "event") if row["name"] == "resume"]
        assert resumed["step"] == 10
        now = curve(again)
        assert now[-1][0] == pytest.approx(curve(raw)[-1][0], rel=1e-5)
        assert not mark.exists()


@pytest.mark.parametrize("kind", ["shard_00000.bin", "shard_00000.idx", "manifest.json"])
def test_damaged_shard_is_named_in_the_error(
    shards: dict[str, str], tmp_path: Path, kind: str
) -> None:
    for name, damage in DAMAGES.items():
        folder, mark = tmp_path / name, tmp_path / f"{name}.ran"
        shutil.copytree(shards["train"], folder)
        damage(folder / kind, mark)
        raw = run_file(
            shards | {"train": str(folder)}, tmp_path / f"{name}_runs", data={"verify": True}
        )
        (error,) = run_ranks(_outcome, 1, raw)
        assert error.split(":")[0] in ("DataError", "MegaLiteError"), (name, error)
        assert str(folder) in error
        assert not mark.exists()


ODD = (
    *("log.txt", "status.json", "metrics.jsonl", "deepspeed.json", "checkpoints/.lease.json"),
    *("tokenizer", "tensorboard"),
)


@pytest.mark.parametrize("name", ODD)
def test_file_in_place_of_a_folder_or_the_opposite_is_refused(
    shards: dict[str, str], tmp_path: Path, name: str
) -> None:
    """The start is refused before anything is written."""
    raw = run_file(shards, tmp_path, logging={"tensorboard": True})
    path = tmp_path / "run" / name
    if name in ("tokenizer", "tensorboard"):
        path.parent.mkdir()
        path.write_text("notes")
    else:
        path.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AssertionError, match=rf"CommandError: .*{name} is a (file|folder)"):
        run_ranks(train, 1, raw)
    assert sorted(tmp_path.rglob("*")) == before


def test_status_json_of_another_program_does_not_stop_a_run(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path, training={"steps": 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"attempt": 1e400}')
    run_ranks(train, 1, raw)
    assert [row["attempt"] for row in rows(raw)] == [0, 0]
