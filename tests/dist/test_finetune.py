# covers: megalite/train/finetuning.py megalite/train/evaluator.py
"""Fine-tuning gives the same numbers on every kind of layout, after a stop, and with adapters."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite.checkpoint import StoredCheckpoint, load_into, open_checkpoint
from megalite.config import load_config, parse_config
from megalite.env import Launch
from megalite.evaluate import open_model
from megalite.model import build, initialize
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rows, run_file, train, zero

WORDS = {"good": "fine grand lovely warm", "bad": "awful cold dreary stale", "odd": "queer rum"}
COMMON = ["the", "a", "film", "plot", "scene", "with", "and", "of", "it", "was", "actor"]
KINDS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "encoder": {"architecture": "encoder", "norm": "layernorm", "activation": "gelu"},
    "encoder_decoder": {"architecture": "encoder_decoder", "position_embedding": "relative"},
}


def write_rows(path: Path, count: int, seed: int) -> None:
    draw, lines = random.Random(seed), []
    for _ in range(count):
        label = draw.choice(list(WORDS))
        words = [draw.choice(COMMON) for _ in range(draw.randint(1, 12))]
        words += draw.choices(WORDS[label].split(), k=2)
        draw.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words), "label": label}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    folder.mkdir()
    write_rows(folder / "train.jsonl", 61, 1)
    write_rows(folder / "test.jsonl", 23, 2)  # a multiple of no batch size
    return folder


def tuning_file(reviews: Path, name: str, **sections: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": name,
        "model": {
            "vocab_size": 258,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.05,
        },
        "finetune": {
            "task": "classification",
            "data": {
                "path": str(reviews),
                "valid_fraction": 0.2,
                "test_split": "test",
                "max_length": 64,
                "tokenizer": "bytes",
                "cache": str(reviews.parent / "cache"),
            },
            "epochs": 3,
        },
        "optimizer": {"lr": 3e-3},
        "training": {
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "log_every": 1,
            "precision": "fp32",
        },
        "checkpoint": {"every": 0, "keep": 1},
        "logging": {"directory": str(reviews.parent / "runs"), "tensorboard": False},
    }
    for key, value in sections.items():
        if isinstance(value, dict):
            raw.setdefault(key, {}).update(value)
    return raw


def tune(launch: Launch, raw: dict[str, Any], **request: Any) -> None:
    from data_prep.examples import prepare

    train(launch, raw, prepare=lambda config: prepare(config, tokenizer=None), **request)


def predictions(raw: dict[str, Any]) -> tuple[list[Any], np.ndarray]:
    path = Path(raw["logging"]["directory"]) / raw["name"] / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    answers = [(row["id"], row["label"], row["prediction"]) for row in lines]
    return answers, np.array([row["probabilities"] for row in lines])


def numbers(raw: dict[str, Any]) -> list[dict[str, Any]]:
    per_start = ("kind", "time", "attempt")
    return [{k: v for k, v in row.items() if k not in per_start} for row in rows(raw, "valid")]


def same(run: dict[str, Any], reference: dict[str, Any]) -> None:
    answers, chances = predictions(run)
    expected, expected_chances = predictions(reference)
    assert answers == expected
    np.testing.assert_allclose(chances, expected_chances, atol=2e-5)
    for row, other in zip(numbers(run), numbers(reference), strict=True):
        assert row.keys() == other.keys()
        assert row["split"] == other["split"]
        for key, value in row.items() - {("split", row["split"])}:
            assert value == pytest.approx(other[key], rel=1e-4, abs=1e-5), (key, row, other)


SEQUENCE = {"tensor": 2, "sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero2": (2, {"deepspeed": zero(2)}),
    "tp2": (2, {"parallel": {"tensor": 2}, "deepspeed": zero(1)}),
    "sequence": (2, {"parallel": SEQUENCE, "deepspeed": zero(3)}),
    "zero3": (2, {"deepspeed": zero(3)}),
}
WEIGHTED = {"label_smoothing": 0.1, "balance_classes": True}
LORA = {"adapter": {"rank": 4}, "freeze": ["*.mlp.down_proj.lora_*"]}


@pytest.mark.parametrize(
    ("kind", "changes", "layouts"),
    [
        ("decoder", {}, ["zero2", "tp2"]),
        pytest.param("decoder", {}, ["sequence", "zero3"], marks=pytest.mark.slow),
        ("encoder", WEIGHTED, ["zero2", "sequence"]),
        ("encoder_decoder", {"freeze": ["model.encoder.*"]}, ["tp2"]),
        ("decoder", LORA, ["sequence"]),
        pytest.param("decoder", LORA, ["zero2", "tp2", "zero3"], marks=pytest.mark.slow),
    ],
    ids=["decoder", "decoder more", "encoder weighted", "two stacks frozen", "lora", "lora more"],
)
def test_finetuning_gives_the_same_predictions_on_any_layout(
    reviews: Path, kind: str, changes: dict[str, Any], layouts: list[str]
) -> None:
    sections = {"model": KINDS[kind]}
    changes = {"epochs": 6, **changes}  # enough epochs to learn the labels
    plain = tuning_file(reviews, "plain", **sections)
    plain["finetune"] |= changes
    run_ranks(_reference, 1, plain)
    last = numbers(plain)[-1]
    assert last["split"] == "test"
    assert last["accuracy"] > 0.5
    for name in layouts:
        ranks, others = LAYOUTS[name]
        raw = tuning_file(reviews, name, **(sections | others))
        raw["finetune"] |= changes
        run_ranks(tune, ranks, raw)
        same(raw, plain)


def _reference(launch: Launch, raw: dict[str, Any]) -> None:
    tune(launch, raw, engine="reference")


def test_adapters_merge_and_other_weights_do_not_change(reviews: Path) -> None:
    raw = tuning_file(reviews, "lora", deepspeed=zero(1))
    raw["finetune"] |= {"adapter": {"rank": 4}}
    run_ranks(tune, 1, raw)
    folder = Path(raw["logging"]["directory"]) / "lora"
    step, manifest = open_checkpoint(folder)
    config = load_config(step / "config.json")
    opened = open_model(step)
    assert opened.config.adapter is None
    unmerged = build(config.model)
    load_into(unmerged, config.model, StoredCheckpoint(step, manifest))
    ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "lengths": torch.tensor([20, 7, 1])}
    with torch.no_grad():
        scores = opened.model.label_scores(batch)
        expected = unmerged.eval().label_scores(batch)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    start = build(config.model)
    initialize(start, config.model, seed=1234, gather=lambda _: nullcontext())
    trained = dict(unmerged.named_parameters())
    moved = {n for n, p in start.named_parameters() if not torch.equal(p, trained[n])}
    assert moved == {n for n in trained if "lora_" in n or n == "score.weight"}
    states = {n: set(e.states) for n, e in manifest.tensors.items()}
    assert states["model.embed_tokens.weight"] == {"weight"}
    assert states["score.weight"] == {"weight", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_weights_of_an_fp32_run_start_and_resume_a_bf16_run(
    shards: dict[str, str], reviews: Path, stage: int
) -> None:
    """A frozen weight has no fp32 master weight, so the engine has its rounded value."""
    model = tuning_file(reviews, "x")["model"]
    first = run_file(shards, reviews.parent / "runs", name="text", model=model)
    first["training"] |= {"steps": 2, "eval_every": 0}
    run_ranks(train, 1, first)
    raw = tuning_file(reviews, "lora", model=model, deepspeed=zero(stage))
    raw["finetune"] |= {"adapter": {"rank": 4}, "epochs": 1}
    run_ranks(_from, 1, raw, str(reviews.parent / "runs" / "text"))  # in fp32
    raw["finetune"]["epochs"], raw["training"]["precision"] = 2, "bf16"
    run_ranks(tune, 2, raw)
    again = tuning_file(reviews, "again", model=model, deepspeed=zero(stage))
    again["finetune"] |= {"adapter": {"rank": 4}, "epochs": 1}
    again["training"]["precision"] = "bf16"
    run_ranks(_from, 2, again, str(reviews.parent / "runs" / "text"))
    for name in ("lora", "again"):
        status = json.loads((reviews.parent / "runs" / name / "status.json").read_text())
        assert (name, status["state"]) == (name, "done")


def test_classifier_starts_from_a_language_model_and_resumes_to_the_same_numbers(
    shards: dict[str, str], reviews: Path
) -> None:
    """Pretrained weights are loaded, and the head is initialised."""
    model = tuning_file(reviews, "x")["model"] | {"initializer_range": 0.02}
    first = run_file(shards, reviews.parent / "runs", name="text", model=model)
    first["training"] |= {"steps": 6, "eval_every": 0}
    run_ranks(train, 1, first)
    text = str(reviews.parent / "runs" / "text")
    # a constant rate, which does not depend on the number of steps
    others = {"deepspeed": zero(1), "schedule": {"name": "constant"}}
    whole = tuning_file(reviews, "whole", model=model, **others)
    parts = tuning_file(reviews, "parts", model=model, **others)
    run_ranks(_from, 1, whole, text)
    parts["training"]["steps"] = 12
    run_ranks(_from, 1, parts, text)
    del parts["training"]["steps"]
    parts |= {"parallel": {"tensor": 2}}
    run_ranks(_from, 2, parts, text)
    losses = [{row["step"]: row["loss"] for row in rows(raw)} for raw in (whole, parts)]
    assert losses[0].keys() == losses[1].keys()
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=1e-4), step
    assert numbers(parts)[-1]["accuracy"] == pytest.approx(numbers(whole)[-1]["accuracy"])


def _from(launch: Launch, raw: dict[str, Any], source: str) -> None:
    tune(launch, raw, init_from=source)


def test_finetuning_keeps_the_best_epoch_and_stops_early(reviews: Path) -> None:
    raw = tuning_file(reviews, "patient", deepspeed=zero(1))
    raw["optimizer"]["lr"] = 0.05  # too high: later epochs are worse
    raw["finetune"] |= {"epochs": 30, "early_stopping": 2, "metric": "loss"}
    run_ranks(tune, 1, raw)
    measured = numbers(raw)
    losses = [row["loss"] for row in measured[:-1]]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 30
    assert measured[-1]["best_step"] == measured[best]["step"]
    assert measured[-1]["split"] == "test"
    folder = Path(raw["logging"]["directory"]) / "patient"
    checkpoints = {path.name for path in (folder / "checkpoints").glob("step_*")}
    assert f"step_{measured[best]['step']:08d}" in checkpoints
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    whole = json.loads((folder / "evaluation.json").read_text())
    assert np.array(whole["confusion"]).sum() == 23
    known = whole["baselines"]
    assert known.keys() == {"majority", "bag_of_words"}
    assert known["majority"].keys() == known["bag_of_words"].keys() == {"accuracy", "f1"}
    assert known["bag_of_words"]["accuracy"] > whole["accuracy"]
    assert "no better than a bag of words on test" in (folder / "log.txt").read_text()
    # commands use the best checkpoint of the run
    assert open_checkpoint(folder)[1].step > measured[best]["step"]
    assert open_checkpoint(folder, weights_only=True)[1].step == measured[best]["step"]
    assert open_model(folder).folder.name == f"step_{measured[best]['step']:08d}"
    before = len(rows(raw))
    run_ranks(tune, 1, raw)  # the same command trains nothing
    assert len(rows(raw)) == before
    assert numbers(raw)[-1]["loss"] == pytest.approx(measured[-1]["loss"], rel=1e-6)


def test_config_of_a_finetuning_run_can_be_parsed_again(reviews: Path) -> None:
    raw = tuning_file(reviews, "x", finetune={"adapter": {"rank": 2}})
    config = parse_config(raw)
    assert config.training.steps == 0
    assert config.model.adapter is not None
    assert config.model.adapter.rank == 2
    assert parse_config(config.model_dump(mode="json")) == config
