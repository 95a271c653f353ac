"""Where a start goes on from, and which changes of the run file it may bring along."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from megalite import files, shapes
from megalite.config import RunConfig
from megalite.errors import CheckpointError, CommandError
from megalite.formats import checkpoint as disk
from megalite.parallel import Grid
from megalite.train.resume import ALLOWABLE, Origin, check_request, find_origin
from tests.factories import run_config, world_of_one

TOKENIZER = "ab" * 32


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    with world_of_one() as found:
        yield found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine" / "checkpoints"


def fingerprint(config: RunConfig, shards: str = "web") -> str:
    """What is read, apart from the windows and the order that the run file itself tells."""
    data = config.data
    return f"{shards} {[source.weight for source in data.train]} {data.mask_documents}"


def publish(root: Path, step: int, config: RunConfig, *, without: str = "") -> Path:
    """A checkpoint without its tensors' values; `without` leaves a key out of config.json."""
    folder = root / disk.folder_name(step)
    folder.mkdir(parents=True)
    content = config.model_dump(mode="json")
    if without:
        section, key = without.split(".")
        del content[section][key]
    files.write_json(folder / "config.json", content)
    (folder / "weights").write_bytes(b"weights")
    entries = {
        name: disk.FileEntry(
            bytes=(folder / name).stat().st_size, sha256=files.sha256_file(folder / name)
        )
        for name in ("config.json", "weights")
    }
    manifest = disk.Manifest(
        format="megalite-checkpoint-1",
        step=step,
        samples=step * 4,
        tokens=step * 32,
        progress={"updates": step},
        optimizer={},
        data_fingerprint=fingerprint(config),
        tokenizer_sha256=TOKENIZER,
        versions={},
        tensors={
            name: disk.TensorEntry(shape=list(tensor.shape), states={})
            for name, tensor in shapes.tensors(config.model).items()
        },
        files=entries,
    )
    disk.write_manifest(folder, manifest)
    return folder


def spoil(folder: Path) -> None:
    (folder / "weights").write_bytes(b"weighed")


def find(
    grid: Grid,
    root: Path,
    config: RunConfig,
    *,
    resume: str = "auto",
    allow: tuple[str, ...] = (),
    shards: str = "web",
    tokenizer: str = TOKENIZER,
) -> Origin | None:
    return find_origin(
        config,
        grid=grid,
        root=root,
        resume=resume,
        allow=allow,
        data_fingerprint=fingerprint(config, shards),
        tokenizer_sha256=tokenizer,
    )


def changed(**sections: Any) -> RunConfig:
    """The run file of `run_config()` with other values, in sections that stay whole otherwise."""
    raw = deepcopy(run_config().model_dump(mode="json"))
    for name, value in sections.items():
        if isinstance(value, dict):
            raw[name].update(value)
        else:
            raw[name] = value
    return RunConfig.model_validate(raw)


# --- which checkpoint ---


def test_a_fresh_start(grid: Grid, root: Path) -> None:
    for resume in ("auto", "never"):
        check_request(root, resume)
        assert find(grid, root, run_config(), resume=resume) is None
    root.mkdir(parents=True)
    (root / ".staging_00000005").mkdir()
    assert find(grid, root, run_config()) is None


def test_auto_takes_the_newest_whole_one(grid: Grid, root: Path) -> None:
    for step in (5, 15, 10):
        publish(root, step, run_config())
    spoil(root / "step_00000015")
    origin = find(grid, root, run_config())
    assert origin is not None
    assert origin.folder == root / "step_00000010"
    assert (origin.place.step, origin.place.samples, origin.place.tokens) == (10, 40, 320)
    assert origin.changes == {}
    assert sorted(path.name for path in root.iterdir()) == [
        "bad_00000015",
        "step_00000005",
        "step_00000010",
    ]


def test_never_refuses_where_checkpoints_are(root: Path) -> None:
    publish(root, 5, run_config())
    with pytest.raises(CommandError, match=r"--resume never, but .* holds step_00000005") as caught:
        check_request(root, "never")
    assert caught.value.exit_code == 2
    check_request(root, "auto")


def test_a_path_that_is_not_there(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"--resume .*nowhere: no such folder"):
        check_request(root, str(tmp_path / "nowhere"))


def test_a_path_without_a_checkpoint(grid: Grid, root: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="holds no checkpoint"):
        find(grid, root, run_config(), resume=str(tmp_path))


def test_only_damaged_ones_are_no_fresh_start(grid: Grid, root: Path) -> None:
    """Neither now nor when the scheduler starts the same command again."""
    for step in (5, 10):
        spoil(publish(root, step, run_config()))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="damaged"):
            find(grid, root, run_config())
    assert sorted(path.name for path in root.iterdir()) == ["bad_00000005", "bad_00000010"]


def test_only_damaged_ones_and_another_to_go_on_from(
    grid: Grid, root: Path, tmp_path: Path
) -> None:
    """What the error advises must work."""
    spoil(publish(root, 5, run_config()))
    other = publish(tmp_path / "other", 3, run_config())
    origin = find(grid, root, run_config(), resume=str(other))
    assert origin is not None
    assert origin.folder == other


def test_a_name_that_is_taken_by_an_older_bad_one(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    for _ in range(3):
        spoil(publish(root, 10, run_config()))
        assert find(grid, root, run_config()) is not None
    bad = sorted(path.name for path in root.glob("bad_*"))
    assert bad == ["bad_00000010", "bad_00000010.1", "bad_00000010.2"]


@pytest.mark.parametrize("kind", ["step", "run", "checkpoints"])
def test_a_path_of_another_run(grid: Grid, root: Path, tmp_path: Path, kind: str) -> None:
    other = tmp_path / "runs" / "other"
    publish(other / "checkpoints", 3, run_config(name="other"))
    newest = publish(other / "checkpoints", 7, run_config(name="other"))
    path = {"step": newest, "run": other, "checkpoints": newest.parent}[kind]
    origin = find(grid, root, run_config(name="mine"), resume=str(path))
    assert origin is not None
    assert (origin.folder, origin.place.samples, origin.changes) == (newest, 28, {})


def test_a_path_to_a_damaged_one_is_refused_and_left(
    grid: Grid, root: Path, tmp_path: Path
) -> None:
    other = publish(tmp_path / "other", 3, run_config())
    spoil(other)
    with pytest.raises(CommandError, match=r"--resume .*weights: its bytes are not those"):
        find(grid, root, run_config(), resume=str(other))
    assert other.is_dir()


@pytest.mark.parametrize("kind", ["run", "checkpoints"])
def test_the_path_of_this_run_is_auto(grid: Grid, root: Path, kind: str) -> None:
    publish(root, 5, run_config())
    spoil(publish(root, 10, run_config()))
    path = root if kind == "checkpoints" else root.parent
    origin = find(grid, root, run_config(), resume=str(path))
    assert origin is not None
    assert origin.folder.name == "step_00000005"


def test_going_back_within_the_run(grid: Grid, root: Path) -> None:
    for step in (5, 10):
        publish(root, step, run_config())
    origin = find(grid, root, run_config(), resume=str(root / "step_00000005"))
    assert origin is not None
    assert origin.folder.name == "step_00000005"


def test_the_same_command_goes_on_from_what_it_made(grid: Grid, root: Path, tmp_path: Path) -> None:
    """A requeued job repeats `--resume OTHER`; its own checkpoints are further along."""
    other = publish(tmp_path / "other", 3, run_config())
    publish(root, 8, run_config())
    origin = find(grid, root, run_config(), resume=str(other))
    assert origin is not None
    assert origin.folder == root / "step_00000008"


# --- which changes ---

FREE: dict[str, dict[str, Any]] = {
    "name": {"name": "renamed"},
    "parallel": {"parallel": {"tensor": 2}},
    "deepspeed": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "micro_batch_size": {"training": {"micro_batch_size": 1}},
    "steps": {"training": {"steps": 7}},
    "evaluation": {"training": {"eval_every": 3, "eval_batches": 1, "log_every": 2}},
    "recompute": {"training": {"activation_checkpointing": "full", "compile": True}},
    "precision": {"training": {"precision": "bf16"}},
    "checkpoint": {"checkpoint": {"every": 1, "keep": 9, "grace_seconds": 1.0}},
    "logging": {"logging": {"directory": "elsewhere", "tensorboard": False}},
    "the shards' place": {"data": {"train": [{"path": "moved/here"}], "verify": True}},
    "validation": {"data": {"valid": [{"path": "held-out"}]}},
}


@pytest.mark.parametrize("name", FREE)
def test_free_changes(grid: Grid, root: Path, name: str) -> None:
    publish(root, 5, run_config())
    origin = find(grid, root, changed(**FREE[name]))
    assert origin is not None
    assert (origin.changes, origin.place.samples) == ({}, 20)


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("optimizer", {"optimizer": {"lr": 0.5}}),
        ("optimizer", {"optimizer": {"name": "sgd"}}),
        ("schedule", {"schedule": {"name": "wsd", "decay_steps": 4}}),
        ("training.global_batch_size", {"training": {"global_batch_size": 8}}),
    ],
)
def test_recorded_changes(grid: Grid, root: Path, key: str, sections: dict[str, Any]) -> None:
    publish(root, 5, run_config())
    origin = find(grid, root, changed(**sections))
    assert origin is not None
    assert list(origin.changes) == [key]
    before, after = origin.changes[key]["before"], origin.changes[key]["after"]
    assert before != after
    json.dumps(origin.changes)  # it becomes a row of metrics.jsonl
    assert origin.place.samples == 20


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a shape": ("model", {"model": {"hidden_size": 48}}),
    "a constant": ("model", {"model": {"hidden_dropout": 0.1}}),
    "length": ("sequence_length", {"data": {"sequence_length": 16}}),
    "order": ("seed", {"data": {"seed": 9}}),
    "dropout's seed": ("seed", {"training": {"seed": 9}}),
    "documents": ("data", {"data": {"mask_documents": True}}),
    "weights": ("data", {"data": {"train": [{"path": "shards", "weight": 2.0}]}}),
}
# the order of samples is another one, in which the old place means nothing
NEW_ORDER = ("length", "order", "documents", "weights")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_changes(grid: Grid, root: Path, name: str) -> None:
    publish(root, 5, run_config())
    key, sections = REFUSED[name]
    pattern = rf"^{key} differs from the checkpoint .*--allow-change {key}$"
    with pytest.raises(CommandError, match=pattern) as caught:
        find(grid, root, changed(**sections))
    assert caught.value.exit_code == 2
    others = tuple(other for other in ALLOWABLE if other != key)
    with pytest.raises(CommandError, match=pattern):
        find(grid, root, changed(**sections), allow=others)


def test_a_model_of_other_shapes_cannot_be_allowed(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    with pytest.raises(CommandError, match="holds another model"):
        find(grid, root, changed(model={"hidden_size": 48}), allow=("model",))


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "a shape"])
def test_allowed_changes_are_recorded(grid: Grid, root: Path, name: str) -> None:
    publish(root, 5, run_config())
    key, sections = REFUSED[name]
    origin = find(grid, root, changed(**sections), allow=(key,))
    assert origin is not None
    assert list(origin.changes) == [key]
    json.dumps(origin.changes)
    assert (origin.place.step, origin.place.tokens) == (5, 160)
    assert origin.place.samples == (0 if name in NEW_ORDER else 20)


def test_other_shards_and_another_tokenizer(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    with pytest.raises(CommandError, match=r"^data differs"):
        find(grid, root, run_config(), shards="code")
    origin = find(grid, root, run_config(), shards="code", allow=("data",))
    assert origin is not None
    assert (origin.place.step, origin.place.samples) == (5, 0)
    with pytest.raises(CommandError, match=r"^tokenizer differs"):
        find(grid, root, run_config(), tokenizer="cd" * 32)
    origin = find(grid, root, run_config(), tokenizer="cd" * 32, allow=("tokenizer",))
    assert origin is not None
    assert list(origin.changes) == ["tokenizer"]


def test_all_refusals_at_once(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    config = changed(model={"hidden_dropout": 0.1}, training={"seed": 9}, optimizer={"lr": 1.0})
    with pytest.raises(CommandError) as caught:
        find(grid, root, config, tokenizer="cd" * 32, shards="code")
    refused = [line.split()[0] for line in str(caught.value).splitlines()]
    assert refused == ["model", "tokenizer", "data", "seed"]
    with pytest.raises(CommandError, match=r"^data differs"):
        find(
            grid,
            root,
            config,
            tokenizer="cd" * 32,
            shards="code",
            allow=("model", "tokenizer", "seed"),
        )


def test_both_seeds_are_named(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    origin = find(grid, root, changed(data={"seed": 8}, training={"seed": 9}), allow=("seed",))
    assert origin is not None
    assert "training.seed" in str(origin.changes["seed"])
    assert "data.seed" in str(origin.changes["seed"])


@pytest.mark.parametrize(
    ("key", "data"), [("sequence_length", {"sequence_length": 16}), ("seed", {"seed": 9})]
)
def test_other_shards_do_not_hide_behind_another_change(
    grid: Grid, root: Path, key: str, data: dict[str, Any]
) -> None:
    publish(root, 5, run_config())
    with pytest.raises(CommandError, match=r"^data differs"):
        find(grid, root, changed(data=data), shards="code", allow=(key,))


@pytest.mark.parametrize("field", ["model.hidden_dropout", "optimizer.l1", "data.mask_documents"])
def test_a_field_younger_than_the_checkpoint_has_its_default(
    grid: Grid, root: Path, field: str
) -> None:
    publish(root, 5, run_config(), without=field)
    origin = find(grid, root, run_config())
    assert origin is not None
    assert origin.changes == {}
