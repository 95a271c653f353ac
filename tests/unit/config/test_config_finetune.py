# covers: megalite/config/finetune.py megalite/config/finetune_rules.py megalite/config/tasks.py
"""Rules of the finetune section, and the keys of other sections that it fills in."""

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


def finetune_config(tuning: dict[str, Any], **model: Any) -> RunConfig:
    raw = {k: v for k, v in BASE.items() if k != "data"}
    training = {"global_batch_size": 8, "micro_batch_size": 2}
    return parse_config(
        raw | {"model": BASE["model"] | model, "finetune": tuning, "training": training}
    )


@pytest.mark.parametrize(
    ("tuning", "model", "message"),
    [
        (section("sft"), {"architecture": "encoder"}, '"sft" needs an architecture "decoder"'),
        (section("seq2seq"), {}, '"seq2seq" needs an architecture "encoder_decoder"'),
        (section("sft", pooling="mean"), {}, "finetune.pooling: only applies to class"),
        (section("sft", metric="f1"), {}, 'finetune.metric: "f1" only applies to classification'),
        (
            section(data={"packing": True}),
            {},
            "packing: only applies to sft and",
        ),
        (
            section(pooling="last"),
            {"architecture": "encoder_decoder"},
            "finetune.pooling: an encoder_decoder",
        ),
        (section(class_weights=[1.0], balance_classes=True), {}, "balance_classes, which is also"),
        (section("sft", data={"prompt_column": "p"}), {}, "response_column belong together"),
        (
            section(data={"test_split": "test", "test_fraction": 0.1}),
            {},
            "test_fraction is also set; remove one of the two",
        ),
        (section(data={"valid_fraction": 0.6, "test_fraction": 0.4}), {}, "no row to train on"),
        (section(early_stopping=2), {}, "needs a validation or a test split"),
        (section(adapter={"rank": 4, "targets": []}), {}, "a list of 1 or more"),
        (section(data={"max_length": 500}), {}, "finetune.data.max_length: 500 is over"),
        ({"task": "classification"}, {}, "finetune.data: is missing"),
    ],
)
def test_finetune_rule_states_fault_and_remedy(
    tuning: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        finetune_config(tuning, **model)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"steps": 0}}, "training.steps: got 0"),
        ({"model": {"num_labels": 2}}, "model.num_labels: only applies to fine-tuning"),
        ({"model": {"adapter": {"rank": 2}}}, "model.adapter: only applies to fine-tuning"),
        ({"finetune": section()}, "data.train: finetune.data defines the data"),
    ],
)
def test_pretraining_refuses_keys_of_fine_tuning(changes: dict[str, Any], message: str) -> None:
    raw: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    for name, value in changes.items():
        raw[name] = raw.get(name, {}) | value
    with pytest.raises(ConfigError) as error:
        parse_config(raw)
    assert message in str(error.value)


def test_finetune_section_fills_in_other_sections() -> None:
    config = finetune_config(section(adapter={"rank": 4}, freeze=["*.k_proj.*"]))
    assert config.training.steps == 0
    assert config.data.sequence_length == 32
    assert config.model.classifier_pooling == "last"
    assert config.model.adapter == config.finetune.adapter if config.finetune else False
    assert finetune_config(section(), architecture="encoder").model.classifier_pooling == "mean"
    assert finetune_config(section(pooling="first")).model.classifier_pooling == "first"


def test_trainable_parameters_follow_adapter_and_freeze() -> None:
    targets = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}
    config = finetune_config(section(adapter=targets), num_labels=3)
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
    tensors = {t.name: (t.shape, t.split) for t in arch.tensors(config.model).values()}
    split = arch.Split
    name = "model.layers.0.self_attn.v_proj"
    assert tensors[f"{name}.lora_A"] == ((4, 32), split.REPLICATED)
    assert tensors[f"{name}.lora_B"] == ((32, 4), split.HEADS)
    name = "model.layers.1.mlp.down_proj"
    assert tensors[f"{name}.lora_A"] == ((4, 64), split.INPUT_DIM)
    assert tensors[f"{name}.lora_B"] == ((32, 4), split.REPLICATED)
    assert "model.layers.0.self_attn.k_proj.lora_A" not in tensors
    assert "lm_head.weight" not in tensors
    frozen = finetune_config(section("sft", freeze=["model.embed_tokens.*", "model.layers.0.*"]))
    names = [row.name for row in arch.parameters(frozen.model) if arch.is_trainable(frozen, row)]
    assert not any(name.startswith(("model.embed", "model.layers.0.")) for name in names)
    assert "model.layers.1.mlp.down_proj.weight" in names


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_parameters_have_no_gradients_or_optimizer_states(stage: int) -> None:
    raw = finetune_config(section(adapter={"rank": 4})).model_dump(mode="json")
    raw["deepspeed"] = {"zero_optimization": {"stage": stage}}
    config = parse_config(raw)
    plan = make_plan(config, world_size=2, device="cpu")
    trainable = sum(
        row.elements for row in arch.parameters(config.model) if arch.is_trainable(config, row)
    )
    assert trainable < plan.parameters / 5
    memory = plan.memory_bytes
    assert memory["optimizer"] <= 12 * trainable
    assert memory["gradients"] <= 8 * trainable
    assert memory["parameters"] >= 2 * plan.parameters


def test_model_argument_gives_defaults_that_the_file_replaces(tmp_path: Any) -> None:
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
