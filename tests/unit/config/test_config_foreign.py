# covers: megalite/config/foreign.py megalite/config/faults.py
"""Key names of other trainers are answered with the key of the same meaning, and no other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megalite.config import load_config, parse_config
from megalite.config.deepspeed_tables import KNOWN
from megalite.config.faults import dotted, known_keys
from megalite.config.foreign import _OTHERWISE, _SAME, foreign_answer
from megalite.errors import ConfigError, nearest
from tests.helpers.runs import BASE

KEYS = {dotted(key) for key in known_keys()}


def fault_of(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    [fault] = caught.value.faults
    return fault


def with_key(section: str, key: str, value: Any = 1) -> dict[str, Any]:
    raw = copy.deepcopy(BASE)
    target = raw
    for part in section.split(".") if section else ():
        target = target.setdefault(part, {})
    target[key] = value
    return raw


def test_every_answer_is_an_existing_key() -> None:
    deepspeed = {f"deepspeed.{at}.{key}".replace("..", ".") for at in KNOWN for key in KNOWN[at]}
    assert set(_SAME) <= KEYS | deepspeed


def test_every_foreign_name_has_one_answer() -> None:
    names = [name for row in (*_SAME.values(), *_OTHERWISE.values()) for name in row.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("save_steps", '"checkpoint.every"'),
        ("eval_steps", '"training.eval_every"'),
        ("logging_steps", '"training.log_every"'),
        ("max_steps", '"training.steps"'),
        ("learning_rate", '"optimizer.lr"'),
        ("lr_scheduler_type", '"schedule.name"'),
        ("warmup_ratio", "set schedule.warmup_steps to this ratio times training.steps"),
        ("gradient_accumulation_steps", "set training.global_batch_size"),
        ("per_device_train_batch_size", '"training.micro_batch_size"'),
        ("num_train_epochs", "set training.steps, or finetune.epochs when fine-tuning"),
        ("output_dir", '"logging.directory"'),
        ("save_total_limit", '"checkpoint.keep"'),
        ("report_to", "set logging.tensorboard or logging.wandb"),
        ("bf16", 'set training.precision to "bf16"'),
        ("fp16", 'set training.precision to "fp16"'),
        ("gradient_checkpointing", "set training.activation_checkpointing"),
        ("n_layer", '"model.num_hidden_layers"'),
        ("n_head", '"model.num_attention_heads"'),
        ("n_embd", '"model.hidden_size"'),
        ("d_model", '"model.hidden_size"'),
        ("hidden_act", '"model.activation"'),
        ("rms_norm_eps", '"model.norm_eps"'),
        ("seq_length", '"data.sequence_length"'),
        ("block_size", '"data.sequence_length"'),
        ("tensor_model_parallel_size", '"parallel.tensor"'),
        ("pipeline_model_parallel_size", "pipeline, context and expert"),
        ("lora_r", '"finetune.adapter.rank"'),
        ("lora_alpha", '"finetune.adapter.alpha"'),
        ("target_modules", '"finetune.adapter.targets"'),
        ("max_grad_norm", '"optimizer.clip_grad_norm"'),
        ("zero_stage", '"deepspeed.zero_optimization.stage"'),
        ("micro-batch-size", 'micro_batch_size"'),
        ("--lr-warmup-iters", '"schedule.warmup_steps"'),
        ("ffn-hidden-size", '"model.intermediate_size"'),
        ("resume_from_checkpoint", "--resume"),
    ],
)
@pytest.mark.parametrize("section", ["", "training", "model", "optimizer"])
def test_foreign_name_is_answered(section: str, name: str, answer: str) -> None:
    assert answer in fault_of(with_key(section, name))


def test_foreign_name_of_set_is_answered(tmp_path: Path) -> None:
    """The message contains the right key, and the option that has the wrong one."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(BASE))
    for item, answer in {
        "training.save_steps=500": '--set training.save_steps: unknown key; its name here is "che',
        "max_steps=3": '--set max_steps: unknown key; its name here is "training.steps"',
        "trainer.max_steps=3": 'name here is "training"; max_steps: its name here is "training.st',
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config(path, [item])
        assert answer in str(caught.value)


def test_nearest_name_differs_by_a_typo_only() -> None:
    """A suggestion for a name of two words has the same two words, except for a typo."""
    names = ["steps", "log_every", "eval_every", "eval_batches", "warmup_steps", "hidden_size"]
    for name in ("save_steps", "eval_steps", "warmup_ratio", "hidden_act", "eval_batch_size"):
        assert nearest(name, names) == ""
    for name, meant in {"evl_every": "eval_every", "warm_up_steps": "warmup_steps"}.items():
        assert nearest(name, names) == f'; did you mean "{meant}"?'


@pytest.mark.parametrize("name", ["expert_steps", "num_experts", "zloss_weight", "hidden_sharing"])
def test_unknown_name_gets_no_suggestion_of_another_meaning(name: str) -> None:
    assert "did you mean" not in fault_of(with_key("training", name))
    assert "did you mean" not in fault_of(with_key("model", name))


def test_key_of_another_section_is_suggested_before_a_similar_one() -> None:
    assert 'did you mean "finetune.epochs"?' in fault_of(with_key("optimizer", "epochs"))
    assert 'did you mean "optimizer.lr"?' in fault_of(with_key("training", "lr"))


@pytest.mark.parametrize(
    ("section", "name", "answer"),
    [
        ("checkpoint", "steps", 'its name here is "checkpoint.every"'),
        ("logging", "steps", 'its name here is "training.log_every"'),
        ("parallel", "data", "start that many ranks"),
        ("training", "max_step", 'its name here is "training.steps"'),
        ("training", "eval_step", 'its name here is "training.eval_every"'),
        ("", "zero_optimization", 'did you mean "deepspeed.zero_optimization"?'),
        ("training", "overlap_comm", '"deepspeed.zero_optimization.overlap_comm"?'),
        ("", "eval", "set training.eval_every and training.eval_batches"),
    ],
)
def test_answer_depends_on_the_section(section: str, name: str, answer: str) -> None:
    assert answer in fault_of(with_key(section, name))


def test_foreign_answer_of_other_names_is_empty() -> None:
    assert foreign_answer("no_such_name") == ""
    assert all(not foreign_answer(key.split(".")[-1]) for key in ("training.steps", "model.norm"))
