# covers: megalite/checkpoint/save.py megalite/checkpoint/load.py megalite/checkpoint/owners.py
# covers: megalite/checkpoint/stored.py megalite/checkpoint/write.py megalite/checkpoint/progress.py
"""Saves and loads in one process."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megalite import arch, checkpoint, files
from megalite.checkpoint import Progress, write
from megalite.checkpoint.owners import owned_parameters
from megalite.checkpoint.stored import StoredCheckpoint, read_part
from megalite.config import CheckpointConfig, RunConfig
from megalite.engine import WEIGHT
from megalite.errors import CheckpointError, CommandError
from megalite.formats import checkpoint as disk
from megalite.mesh import Mesh
from megalite.model import build
from megalite.parallel import Grid
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.models import loss_of, make_batch, make_engine, model_config, train_steps

PROGRESS = Progress(step=3, samples=12, tokens=96)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def tensors_of(folder: Path, state: str = WEIGHT) -> dict[str, Tensor]:
    """Read the tensors by the manifest and safetensors, without MegaLite."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = {}
    for name, entry in manifest["tensors"].items():
        with safe_open(folder / entry["states"][state]["file"], framework="pt") as file:
            tensors[name] = file.get_tensor(name)
    return tensors


SECTIONS: list[dict[str, Any]] = [
    {"optimizer": {"name": "adamw"}},
    {"optimizer": {"name": "sgd"}, "model": {"tie_word_embeddings": True}},
    {"optimizer": {"name": "sgd", "momentum": 0.0}, "model": {"hidden_dropout": 0.2}},
]


@pytest.mark.parametrize("sections", SECTIONS)
def test_resumed_engine_equals_the_uninterrupted_one(
    grid: Grid, root: Path, sections: dict[str, Any]
) -> None:
    """Losses, gradient norms, weights and all optimizer states are bitwise equal."""
    first = make_engine(**sections)
    train_steps(first, range(1, 4))
    folder = save_checkpoint(first, grid, root)
    expected = train_steps(first, range(4, 7))
    second = make_engine(**sections, training={"seed": 99})  # the load replaces all weights
    _, manifest = checkpoint.open_checkpoint(folder)
    progress = checkpoint.restore(
        second, second.config, grid=grid, folder=folder, manifest=manifest
    )
    assert progress == PROGRESS
    second.config = first.config
    assert train_steps(second, range(4, 7)) == expected
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        for state in (WEIGHT, *first.optimizer.state[ours]):
            if state == "step":
                assert first.optimizer.state[ours][state] == 6.0
            assert torch.equal(first.read_state(ours, state), second.read_state(theirs, state))


def test_checkpoint_has_the_documented_files(grid: Grid, root: Path) -> None:
    trained = make_engine()
    train_steps(trained, range(1, 4))
    folder = save_checkpoint(trained, grid, root)
    assert folder == root / "step_00000003"
    assert [path.name for path in root.iterdir()] == [folder.name]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert [name for name in names if not name.endswith(".safetensors")] == [
        "config.json",
        "manifest.json",
        "tokenizer",
        "tokenizer/bytes.json",
        "tokenizer/inner",
        "tokenizer/inner/more.txt",
    ]
    manifest = disk.read_manifest(folder)
    assert disk.find_damage(folder, manifest) == []
    assert {*manifest.files, "manifest.json"} == {n for n in names if (folder / n).is_file()}
    assert RunConfig.model_validate(files.read_json(folder / "config.json")) == trained.config
    assert Progress(manifest.step, manifest.samples, manifest.tokens) == PROGRESS
    assert manifest.progress == {"updates": 3}
    weights = tensors_of(folder)
    qkv = trained.model.get_parameter("model.layers.1.self_attn.qkv_proj.weight").data
    parts = [weights[f"model.layers.1.self_attn.{kind}_proj.weight"] for kind in "qkv"]
    assert [len(part) for part in parts] == [24, 12, 12]
    assert torch.equal(torch.cat(parts), qkv)
    for state in (WEIGHT, "exp_avg", "exp_avg_sq"):
        tensors = tensors_of(folder, state)
        expected = {name: t.shape for name, t in arch.tensors(trained.config.model).items()}
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_checkpoint_files_have_a_bounded_size(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = make_engine()
    expected = tensors_of(save_checkpoint(trained, grid, root))
    monkeypatch.setattr(write, "_FILE_BYTES", 8000)
    folder = save_checkpoint(trained, grid, root, progress=Progress(4))
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert all(torch.equal(expected[name], tensor) for name, tensor in tensors_of(folder).items())


def test_weights_load_from_a_moved_folder_without_an_engine(
    grid: Grid, root: Path, tmp_path: Path
) -> None:
    trained = make_engine()
    train_steps(trained, range(1, 3))
    moved = tmp_path / "elsewhere"
    shutil.move(save_checkpoint(trained, grid, root), moved)
    folder, manifest = checkpoint.open_checkpoint(moved)
    model = build(trained.config.model)
    checkpoint.load_into(model, trained.config.model, StoredCheckpoint(folder, manifest))
    batch = make_batch(trained.config.model).tensors
    assert loss_of(model, batch).item() == loss_of(trained.model.eval(), batch).item()


def test_load_weights_leaves_the_optimizer_fresh(grid: Grid, root: Path) -> None:
    trained = make_engine()
    train_steps(trained, range(1, 4))
    folder, manifest = checkpoint.open_checkpoint(save_checkpoint(trained, grid, root))
    fresh = make_engine(training={"seed": 99})
    checkpoint.load_weights(fresh, fresh.config.model, grid=grid, folder=folder, manifest=manifest)
    for ours, theirs in zip(trained.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not fresh.read_state(theirs, "exp_avg").any()
    assert fresh.progress() == {"updates": 0}


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"vocab_size": 62}, r"\[61, 24\] there, \[62, 24\]"),
        ({"tie_word_embeddings": True}, "lm_head.weight is .* there, absent"),
        ({"mlp_bias": True}, "bias is absent there"),
    ],
)
def test_restore_refuses_another_model(
    grid: Grid, root: Path, model: dict[str, Any], difference: str
) -> None:
    folder, manifest = checkpoint.open_checkpoint(save_checkpoint(make_engine(), grid, root))
    other = make_engine(model=model)
    with pytest.raises(CommandError, match=f"holds another model: .*{difference}"):
        checkpoint.restore(other, other.config, grid=grid, folder=folder, manifest=manifest)


def test_restore_checks_the_number_of_updates(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's bias correction depends on the number of updates."""
    trained = make_engine()
    train_steps(trained, range(1, 4))
    folder, manifest = checkpoint.open_checkpoint(save_checkpoint(trained, grid, root))
    other = make_engine()
    monkeypatch.setattr(other, "restore_progress", lambda progress: None)
    with pytest.raises(CheckpointError, match="should have made 3 updates, but reports 0"):
        checkpoint.restore(other, other.config, grid=grid, folder=folder, manifest=manifest)


@pytest.mark.parametrize(
    ("before", "after"),
    [({"name": "adamw"}, {"name": "sgd"}), ({"name": "sgd"}, {"name": "adamw"})],
)
def test_restore_with_another_optimizer_loads_only_the_weights(
    grid: Grid, root: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    trained = make_engine(optimizer=before)
    train_steps(trained, range(1, 4))
    folder, manifest = checkpoint.open_checkpoint(save_checkpoint(trained, grid, root))
    other = make_engine(optimizer=after)
    progress = checkpoint.restore(other, other.config, grid=grid, folder=folder, manifest=manifest)
    assert progress == PROGRESS
    for ours, theirs in zip(trained.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    train_steps(other, range(4, 5))


# --- retention, and the choice of a checkpoint ---


def test_retain_keeps_every_kth_and_the_best(grid: Grid, root: Path) -> None:
    engine = make_engine()
    losses = {10: 3.0, 20: 2.0, 30: None, 40: 2.0, 50: 2.2}  # 20 is the first of the best
    for step, loss in losses.items():
        progress = Progress(step, 8 * step, 64 * step, valid_loss=loss)
        save_checkpoint(engine, grid, root, progress=progress)
    checkpoint.retain(root, CheckpointConfig(keep=1, keep_every=30, keep_best=True)).join()
    assert [disk.step_of(folder) for folder in disk.published(root)] == [50, 30, 20]
    assert disk.read_manifest(root / "step_00000020").valid_loss == 2.0
    checkpoint.retain(root, CheckpointConfig(keep=1)).join()
    assert [disk.step_of(folder) for folder in disk.published(root)] == [50]


def test_retain_keeps_the_newest(root: Path) -> None:
    for step in (1, 2, 10, 100_000_000):
        (root / disk.folder_name(step)).mkdir(parents=True)
    (root / "bad_00000001").mkdir()
    checkpoint.retain(root, CheckpointConfig(keep=2)).join()
    assert sorted(path.name for path in root.iterdir()) == [
        "bad_00000001",
        "step_00000010",
        "step_100000000",
    ]
    checkpoint.retain(root, CheckpointConfig(keep=5)).join()
    assert len(disk.published(root)) == 2


def test_clear_leftovers_keeps_published_and_bad_checkpoints(root: Path) -> None:
    names = ("step_00000001", "bad_00000002", ".staging_00000003", ".deleted_step_00000004")
    for name in names:
        (root / name / "inner").mkdir(parents=True)
    checkpoint.clear_leftovers(root)
    assert sorted(path.name for path in root.iterdir()) == ["bad_00000002", "step_00000001"]
    checkpoint.clear_leftovers(root / "none")


def test_open_checkpoint_takes_step_and_run_folders(grid: Grid, root: Path) -> None:
    trained = make_engine()
    for step in (1, 2):
        save_checkpoint(trained, grid, root, progress=Progress(step))
    newest = root / "step_00000002"
    for path in (root.parent, root, newest):
        folder, manifest = checkpoint.open_checkpoint(path)
        assert (folder, manifest.step) == (newest, 2)
    assert checkpoint.open_checkpoint(root / "step_00000001")[1].step == 1
    (newest / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: .* bytes were written, got 2"):
        checkpoint.open_checkpoint(root.parent)
    with pytest.raises(CommandError, match="holds no checkpoint"):
        checkpoint.open_checkpoint(root.parents[1])
    with pytest.raises(CommandError, match="holds no checkpoint"):
        checkpoint.open_checkpoint(root / "none")


def test_damaged_checkpoints_are_reported_and_renamed(
    grid: Grid, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = make_engine()
    for step in (1, 2, 3):
        save_checkpoint(trained, grid, root, progress=Progress(step))
    (root / "step_00000003" / "manifest.json").unlink()
    weights = next((root / "step_00000002").glob("exp_avg-*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    newest, damaged = checkpoint.find_newest(root, grid)
    assert newest is not None
    assert newest[0] == root / "step_00000001"
    assert damaged == (root / "step_00000003", root / "step_00000002")
    checkpoint.set_aside_damaged(damaged, grid)
    assert sorted(path.name for path in root.iterdir()) == [
        "bad_00000002",
        "bad_00000003",
        "step_00000001",
    ]
    for words in ("has no manifest.json", weights.name, "set aside as bad_00000002"):
        assert words in caplog.text


# --- the part of each rank ---


@pytest.mark.parametrize("ranks", [1, 2, 5, 64])
def test_owners_have_about_equally_many_bytes(grid: Grid, ranks: int) -> None:
    config = model_config(num_hidden_layers=4)
    engine: Any = SimpleNamespace(model=build(config), owner_rank=lambda _: None)
    mesh = Mesh(data=ranks)
    views = [replace(grid, world_size=ranks, rank=rank, mesh=mesh) for rank in range(ranks)]
    owned = [list(owned_parameters(engine, config, view)) for view in views]
    owners = [[entry.at.rank for entry in entries] for entries in owned]
    assert all(other == owners[0] for other in owners)
    sizes = [entry.parameter.numel() for entry in owned[0]]
    loads = [sum(s for s, o in zip(sizes, owners[0], strict=True) if o == r) for r in range(ranks)]
    assert sum(loads) == sum(p.numel() for p in engine.model.parameters())
    assert max(loads) <= sum(sizes) / ranks + max(sizes)


def test_owners_of_local_states_are_in_the_copy_of_their_zero_rank(grid: Grid) -> None:
    """Local states come last, and their bytes are spread over the ranks that share the model."""
    config = model_config(num_hidden_layers=4)
    model = build(config)
    local = {id(p): number % 3 for number, p in enumerate(model.parameters()) if number % 2}
    engine: Any = SimpleNamespace(model=model, owner_rank=lambda p: local.get(id(p)))
    mesh = Mesh(data=3, tensor=2)
    owned = list(owned_parameters(engine, config, replace(grid, world_size=6, mesh=mesh)))
    assert [owner.local for owner in owned] == sorted(owner.local for owner in owned)
    for owner in owned:
        assert owner.local == (id(owner.parameter) in local)
        if owner.local:
            assert owner.at.zero_rank == local[id(owner.parameter)]
    assert {owner.at.tensor_rank for owner in owned if owner.local} == {0, 1}


@pytest.mark.parametrize(("size", "chunk"), [(1, 1 << 22), (2, 1 << 22), (2, 1)])
def test_read_part_returns_the_slices_of_a_rank(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch, size: int, chunk: int
) -> None:
    """Padding is zero. Columns are read a chunk of rows at a time."""
    monkeypatch.setattr(disk, "_CHUNK", chunk)
    engine = make_engine()
    folder = save_checkpoint(engine, grid, root)
    manifest = disk.read_manifest(folder)
    for row, rank in itertools.product(arch.parameters(engine.config.model), range(size)):
        value = engine.model.get_parameter(row.name).data
        full = {piece.tensor.name: value[piece.target] for piece in arch.pieces(row)}
        at = Mesh(tensor=size).at(rank)
        local = read_part(StoredCheckpoint(folder, manifest), row, "weight", at)
        assert local.shape == arch.local_shape(row, at)
        expected = torch.zeros_like(local)
        for box in arch.pieces(row, at):
            expected[box.target] = full[box.tensor.name][box.source]
        assert torch.equal(local, expected)


def test_checkpoint_without_optimizer_files_opens_for_its_weights_only(
    grid: Grid, root: Path
) -> None:
    folder = save_checkpoint(make_engine(), grid, root)
    for path in folder.glob("exp_avg*"):
        path.unlink()
    assert checkpoint.open_checkpoint(folder, weights_only=True)[0] == folder
    with pytest.raises(CheckpointError, match=r"exp_avg-.* is missing"):
        checkpoint.open_checkpoint(folder)
    next(folder.glob("model-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-.* is missing"):
        checkpoint.open_checkpoint(folder, weights_only=True)


def test_open_checkpoint_refuses_a_folder_of_shards(tmp_path: Path) -> None:
    files.write_json(tmp_path / "manifest.json", {"format": "megalite-shards-1"})
    with pytest.raises(CommandError, match="holds 'megalite-shards-1', not a checkpoint"):
        checkpoint.open_checkpoint(tmp_path)


def test_clear_leftovers_removes_partial_files(grid: Grid, root: Path) -> None:
    folder = save_checkpoint(make_engine(), grid, root)
    (root / "..lease.json.0a1b2c3d.tmp").write_text("{")
    (root / "notes.tmp").write_text("a person's")
    checkpoint.clear_leftovers(root)
    assert sorted(path.name for path in root.iterdir()) == ["notes.tmp", folder.name]
