# covers: megalite/train/changes.py
"""Changes of the run file at a resume: free, recorded or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import CommandError
from megalite.optim import learning_rate
from megalite.parallel import Grid
from megalite.train.changes import ALLOWABLE
from tests.helpers.checkpoints import changed_config, find, publish
from tests.helpers.models import run_config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine" / "checkpoints"


FREE: dict[str, dict[str, Any]] = {
    "name": {"name": "renamed"},
    "parallel": {"parallel": {"tensor": 2}},
    "deepspeed": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "micro_batch_size": {"training": {"micro_batch_size": 1}},
    "steps": {"training": {"steps": 7}, "schedule": {"name": "constant"}},
    "evaluation": {"training": {"eval_every": 3, "eval_batches": 1, "log_every": 2}},
    "recompute": {"training": {"activation_checkpointing": "full", "compile": True}},
    "checkpoint": {"checkpoint": {"every": 1, "keep": 9, "stop_grace_seconds": 1.0}},
    "logging": {"logging": {"directory": "elsewhere", "tensorboard": False}},
    "path of shards": {"data": {"train": [{"path": "moved/here"}], "verify": True}},
    "validation": {"data": {"valid": [{"path": "held-out"}]}},
}


@pytest.mark.parametrize("name", FREE)
def test_resume_ignores_free_changes(grid: Grid, root: Path, name: str) -> None:
    publish(root, 5, changed_config(schedule=FREE[name].get("schedule", {})))
    point = find(grid, root, changed_config(**FREE[name]))
    assert point is not None
    assert (point.changes, point.progress.samples) == ({}, 20)


@pytest.mark.parametrize(
    ("keys", "sections"),
    [
        ("optimizer.lr", {"optimizer": {"lr": 0.5}}),
        ("optimizer.name", {"optimizer": {"name": "sgd"}}),
        ("schedule.name schedule.decay_steps", {"schedule": {"name": "wsd", "decay_steps": 4}}),
        ("schedule.warmup_steps", {"schedule": {"warmup_steps": 9}}),
        ("training.global_batch_size", {"training": {"global_batch_size": 8}}),
        ("training.precision", {"training": {"precision": "bf16"}}),
        ("training.steps", {"training": {"steps": 20}}),  # changes a cosine over the whole run
    ],
)
def test_resume_records_changes_key_by_key(
    grid: Grid, root: Path, keys: str, sections: dict[str, Any]
) -> None:
    publish(root, 5, run_config())
    point = find(grid, root, changed_config(**sections))
    assert point is not None
    assert list(point.changes) == keys.split()
    for key in keys.split():
        before, after = point.changes[key]["before"], point.changes[key]["after"]
        assert before != after
        assert not isinstance(before, dict)
    json.dumps(point.changes)  # it becomes a row of metrics.jsonl
    assert point.progress.samples == 20


@pytest.mark.parametrize(
    ("sections", "changes_rate"),
    [
        ({"training": {"steps": 20}}, True),
        ({"optimizer": {"lr": 0.5}}, True),
        ({"schedule": {"name": "constant"}}, True),
        ({"schedule": {"warmup_steps": 9}}, True),
        ({"schedule": {"min_lr_ratio": 0.5}}, True),
        ({"schedule": {"decay_steps": 8}}, True),
        ({"optimizer": {"clip_grad_norm": 7.0}}, False),
        ({"training": {"global_batch_size": 8}}, False),
    ],
)
def test_resume_point_has_the_next_learning_rate_before_and_after(
    grid: Grid, root: Path, sections: dict[str, Any], changes_rate: bool
) -> None:
    publish(root, 5, run_config())
    config = changed_config(**sections)
    point = find(grid, root, config)
    assert point is not None
    assert point.rates == (learning_rate(run_config(), 6), learning_rate(config, 6))
    assert (point.rates[0] != point.rates[1]) == changes_rate


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a constant": ("model", {"model": {"hidden_dropout": 0.1}}),
    "length": ("sequence_length", {"data": {"sequence_length": 16}}),
    "order": ("seed", {"data": {"seed": 9}}),
    "dropout's seed": ("seed", {"training": {"seed": 9}}),
    "documents": ("data", {"data": {"mask_documents": True}}),
    "weights": ("data", {"data": {"train": [{"path": "shards", "weight": 2.0}]}}),
}
# these change the data order, in which the old position means nothing
NEW_ORDER = ("length", "order", "documents", "weights")


@pytest.mark.parametrize("name", REFUSED)
def test_resume_refuses_changes_without_allow_change(grid: Grid, root: Path, name: str) -> None:
    publish(root, 5, run_config())
    key, sections = REFUSED[name]
    pattern = rf"^{key} differs from the checkpoint .*--allow-change {key}$"
    with pytest.raises(CommandError, match=pattern) as caught:
        find(grid, root, changed_config(**sections))
    assert caught.value.exit_code == 2
    others = tuple(other for other in ALLOWABLE if other != key)
    with pytest.raises(CommandError, match=pattern):
        find(grid, root, changed_config(**sections), allow=others)


def test_allow_change_does_not_accept_a_model_of_other_shapes(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    for allow in ((), ("model",)):
        with pytest.raises(CommandError, match="holds another model"):
            find(grid, root, changed_config(model={"hidden_size": 48}), allow=allow)


@pytest.mark.parametrize("name", REFUSED)
def test_resume_records_allowed_changes(grid: Grid, root: Path, name: str) -> None:
    publish(root, 5, run_config())
    key, sections = REFUSED[name]
    point = find(grid, root, changed_config(**sections), allow=(key,))
    assert point is not None
    assert list(point.changes) == [key]
    json.dumps(point.changes)
    assert (point.progress.step, point.progress.tokens) == (5, 160)
    assert point.progress.samples == (0 if name in NEW_ORDER else 20)


def test_resume_refuses_other_shards_and_another_tokenizer(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    with pytest.raises(CommandError, match=r"^data differs"):
        find(grid, root, run_config(), shards="code")
    point = find(grid, root, run_config(), shards="code", allow=("data",))
    assert point is not None
    assert (point.progress.step, point.progress.samples) == (5, 0)
    with pytest.raises(CommandError, match=r"^tokenizer differs"):
        find(grid, root, run_config(), tokenizer="cd" * 32)
    point = find(grid, root, run_config(), tokenizer="cd" * 32, allow=("tokenizer",))
    assert point is not None
    assert list(point.changes) == ["tokenizer"]


def test_refusal_lists_all_changes(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    config = changed_config(
        model={"hidden_dropout": 0.1}, training={"seed": 9}, optimizer={"lr": 1.0}
    )
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


def test_change_of_seeds_names_both(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    point = find(
        grid, root, changed_config(data={"seed": 8}, training={"seed": 9}), allow=("seed",)
    )
    assert point is not None
    assert "training.seed" in str(point.changes["seed"])
    assert "data.seed" in str(point.changes["seed"])


@pytest.mark.parametrize(
    ("key", "data"), [("sequence_length", {"sequence_length": 16}), ("seed", {"seed": 9})]
)
def test_change_of_shards_is_refused_next_to_an_allowed_change(
    grid: Grid, root: Path, key: str, data: dict[str, Any]
) -> None:
    publish(root, 5, run_config())
    with pytest.raises(CommandError, match=r"^data differs"):
        find(grid, root, changed_config(data=data), shards="code", allow=(key,))


@pytest.mark.parametrize("field", ["model.hidden_dropout", "optimizer.l1", "data.mask_documents"])
def test_key_that_the_checkpoint_lacks_has_its_default(grid: Grid, root: Path, field: str) -> None:
    publish(root, 5, run_config(), without=field)
    point = find(grid, root, run_config())
    assert point is not None
    assert point.changes == {}


def test_changed_default_of_deepspeed_is_recorded_with_a_warning(
    grid: Grid, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {"gradient_clipping": 0.0, "bf16.check_grad_overflow": False, "steps_per_print": 10}
    publish(root, 5, run_config(), deepspeed=before)
    now = {"bf16.check_grad_overflow": True, "steps_per_print": 10, "new_key": 1}
    with caplog.at_level("WARNING", logger="megalite"):
        point = find(grid, root, run_config(), deepspeed=now)
    assert point is not None
    changed_key = "deepspeed.bf16.check_grad_overflow"
    assert point.changes == {changed_key: {"before": False, "after": True}}
    [message] = [record.getMessage() for record in caplog.records]
    expected = f"{changed_key} is not set, and DeepSpeed's default was False in 0.19.2"
    assert message.startswith(expected)
