# covers: megalite/config/finetune.py megalite/config/tasks.py
"""Rules of the finetune section, and what it fills in elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from megalite import arch
from megalite.config import RunConfig, load_config, parse_config
from megalite.errors import ConfigError
from megalite.plan import make_plan
from tests.helpers.runs import BASE


def section(task: str = "classification", **changes: Any) -> dict[str, Any]:
    data = {"path": "a.csv", "max_length": 32} | changes.pop("data", {})
    return {"task": task, "data": data, **changes}


def made(tuning: dict[str, Any], **model: Any) -> RunConfig:
    raw = {k: v for k, v in BASE.items() if k != "data"}
    training = {"global_batch_size": 8, "micro_batch_size": 2}
    return parse_config(
        raw | {"model": BASE["model"] | model, "finetune": tuning, "training": training}
    )


@pytest.mark.parametrize(
    ("tuning", "model", "said"),
    [
        (section("sft"), {"architecture": "encoder"}, '"sft" needs an architecture "decoder"'),
        (section("seq2seq"), {}, '"seq2seq" needs an architecture "encoder_decoder"'),
        (section("sft", pooling="mean"), {}, "finetune.pooling: it only applies to class"),
        (section("sft", metric="f1"), {}, 'finetune.metric: "f1" is of a classification'),
        (
            section(data={"packing": True}),
            {},
            "packing: it only applies to sft and",
        ),
        (
            section(pooling="last"),
            {"architecture": "encoder_decoder"},
            "finetune.pooling: an encoder_decoder",
        ),
        (section(class_weights=[1.0], balance_classes=True), {}, "balance_classes makes them"),
        (section("sft", data={"prompt_column": "p"}), {}, "it goes with response_column"),
        (
            section(data={"test_split": "test", "test_fraction": 0.1}),
            {},
            "give it or test_fraction, not both",
        ),
        (section(data={"valid_fraction": 0.6, "test_fraction": 0.4}), {}, "leaves no row to learn"),
        (section(early_stopping=2), {}, "it needs a valid or a test split"),
        (section(adapter={"rank": 4, "targets": []}), {}, "a list of 1 or more"),
        (section(data={"max_length": 500}), {}, "finetune.data.max_length: 500 is over"),
        ({"task": "classification"}, {}, "finetune.data: is missing"),
    ],
)
def test_what_does_not_go_together(
    tuning: dict[str, Any], model: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        made(tuning, **model)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"steps": 0}}, "training.steps: found 0"),
        ({"model": {"num_labels": 2}}, "model.num_labels: fine-tuning fills it in"),
        ({"model": {"adapter": {"rank": 2}}}, "model.adapter: fine-tuning fills it in"),
        ({"finetune": section()}, "data.train: examples come from finetune.data"),
    ],
)
def test_pretraining_has_none_of_it(changes: dict[str, Any], said: str) -> None:
    raw: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    for name, value in changes.items():
        raw[name] = raw.get(name, {}) | value
    with pytest.raises(ConfigError) as error:
        parse_config(raw)
    assert said in str(error.value)


def test_what_is_filled_in() -> None:
    config = made(section(adapter={"rank": 4}, freeze=["*.k_proj.*"]))
    assert config.training.steps == 0
    assert config.data.sequence_length == 32
    assert config.model.classifier_pooling == "last"
    assert config.model.adapter == config.finetune.adapter if config.finetune else False
    assert made(section(), architecture="encoder").model.classifier_pooling == "mean"
    assert made(section(pooling="first")).model.classifier_pooling == "first"


def test_what_learns() -> None:
    targets = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}
    config = made(section(adapter=targets), num_labels=3)
    rows = arch.parameters(config.model)
    assert {row.name for row in rows if arch.is_trainable(config, row)} == {
        "score.weight",
        *(
            f"model.layers.{layer}.{name}.lora_{kind}"
            for layer in range(2)
            for name in ("self_attn.qkv_proj", "mlp.down_proj")
            for kind in "AB"
        ),
    }
    found = {t.name: (t.shape, t.split) for t in arch.tensors(config.model).values()}
    split = arch.Split
    name = "model.layers.0.self_attn.v_proj"
    assert found[f"{name}.lora_A"] == ((4, 32), split.REPLICATED)
    assert found[f"{name}.lora_B"] == ((32, 4), split.HEADS)
    name = "model.layers.1.mlp.down_proj"
    assert found[f"{name}.lora_A"] == ((4, 64), split.INPUT_DIM)
    assert found[f"{name}.lora_B"] == ((32, 4), split.REPLICATED)
    assert "model.layers.0.self_attn.k_proj.lora_A" not in found
    assert "lm_head.weight" not in found
    frozen = made(section("sft", freeze=["model.embed_tokens.*", "model.layers.0.*"]))
    left = [row.name for row in arch.parameters(frozen.model) if arch.is_trainable(frozen, row)]
    assert not any(name.startswith(("model.embed", "model.layers.0.")) for name in left)
    assert "model.layers.1.mlp.down_proj.weight" in left


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_frozen_has_no_states(stage: int) -> None:
    raw = made(section(adapter={"rank": 4})).model_dump(mode="json")
    raw["deepspeed"] = {"zero_optimization": {"stage": stage}}
    config = parse_config(raw)
    plan = make_plan(config, world_size=2, device="cpu")
    learned = sum(
        row.elements for row in arch.parameters(config.model) if arch.is_trainable(config, row)
    )
    assert learned < plan.parameters / 5
    memory = plan.memory_bytes
    assert memory["optimizer"] <= 12 * learned
    assert memory["gradients"] <= 8 * learned
    assert memory["parameters"] >= 2 * plan.parameters


def test_a_model_from_elsewhere_lies_under_the_file(tmp_path: Any) -> None:
    path = tmp_path / "run.json"
    path.write_text(
        '{"name": "x", "model": {"hidden_dropout": 0.1}, "optimizer": {"lr": 1},'
        ' "training": {"global_batch_size": 2, "micro_batch_size": 1},'
        ' "finetune": {"task": "sft", "data": {"path": "a.jsonl", "max_length": 16}}}'
    )
    config = load_config(path, model=BASE["model"])
    assert config.model.hidden_size == 32
    assert config.model.hidden_dropout == 0.1
    with pytest.raises(ConfigError, match=r"model\.hidden_size: is missing"):
        load_config(path)
