# covers: megalite/config/foreign.py
"""Key names of other trainers are answered with MegaLite's key, in a run file and in `--set`.

The names are those of Hugging Face, PEFT, Megatron-LM, litgpt, torchtitan, nanoGPT and DeepSpeed.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from megalite.config import load_config
from megalite.config.faults import dotted, known_keys
from megalite.config.foreign import _OTHERWISE
from megalite.errors import ConfigError
from tests.helpers.runs import BASE, merge_sections

# A text of the answer, and the names that have this answer.
ANSWERS = {
    '"name"': "run_name",
    '"checkpoint.every"': "save_steps save_interval",
    '"checkpoint.keep"': "save_total_limit keep_latest_k",
    '"checkpoint.background"': "async_save async_mode",
    '"optimizer.lr"': "learning_rate",
    '"optimizer.name"': "optim",
    '"optimizer.betas"': "adam_beta1 adam_beta2",
    '"optimizer.eps"': "adam_epsilon",
    '"optimizer.momentum"': "sgd_momentum",
    '"optimizer.clip_grad_norm"': "max_grad_norm clip_grad max_norm gradient_clipping",
    '"schedule.name"': "lr_scheduler_type lr_decay_style decay_type",
    '"schedule.warmup_steps"': "lr_warmup_iters lr_warmup_steps",
    '"schedule.min_lr_ratio"': "min_lr_factor",
    "schedule.min_lr_ratio": "min_lr",
    "schedule.warmup_steps": "warmup_ratio lr_warmup_fraction",
    "schedule.decay_steps": "lr_decay_iters decay_ratio lr_wsd_decay_iters",
    '"training.steps"': "max_steps train_iters max_iters",
    '"training.tokens"': "max_tokens",
    "training.steps": "num_train_epochs train_samples",
    '"training.micro_batch_size"': "per_device_train_batch_size local_batch_size "
    "train_micro_batch_size_per_gpu",
    "training.global_batch_size": "gradient_accumulation_steps batch_size train_batch_size "
    "rampup_batch_size",
    '"training.log_every"': "logging_steps log_interval log_freq",
    '"training.eval_every"': "eval_steps eval_interval",
    '"training.eval_batches"': "eval_iters",
    "training.micro_batch_size": "per_device_eval_batch_size",
    '"training.precision"': "torch_dtype mixed_precision_param",
    'training.precision to "bf16"': "bf16",
    'training.precision to "fp16"': "fp16",
    "training.activation_checkpointing": "gradient_checkpointing recompute_granularity",
    '"training.compile"': "torch_compile",
    "training.profile": "enable_profiling",
    '"logging.directory"': "output_dir out_dir dump_folder save",
    '"logging.tensorboard"': "enable_tensorboard",
    "logging.tensorboard or logging.wandb": "report_to",
    '"logging.wandb.project"': "wandb_project",
    '"model.num_hidden_layers"': "n_layer num_layers",
    '"model.num_attention_heads"': "n_head num_heads",
    '"model.num_key_value_heads"': "num_query_groups n_query_groups n_kv_heads",
    '"model.hidden_size"': "n_embd d_model",
    '"model.intermediate_size"': "ffn_hidden_size n_inner d_ff",
    '"model.head_dim"': "kv_channels d_kv",
    '"model.max_position_embeddings"': "n_positions n_ctx",
    '"model.vocab_size"': "padded_vocab_size",
    '"model.norm"': "normalization norm_class_name",
    '"model.norm_eps"': "rms_norm_eps layer_norm_epsilon norm_epsilon",
    '"model.activation"': "hidden_act activation_function",
    'model.activation to "swiglu"': "swiglu",
    '"model.rope_theta"': "rotary_base rope_base",
    '"model.hidden_dropout"': "resid_pdrop hidden_dropout_prob",
    '"model.attention_dropout"': "attn_pdrop attention_probs_dropout_prob",
    '"model.tie_word_embeddings"': "tie_embeddings",
    "model.tie_word_embeddings to false": "untie_embeddings_and_output_weights",
    '"model.initializer_range"': "init_method_std",
    '"model.qk_norm"': "qk_layernorm",
    '"data.train"': "data_path",
    '"data.sequence_length"': "seq_length seq_len block_size max_seq_length",
    '"data.mask_documents"': "reset_attention_mask",
    '"parallel.tensor"': "tensor_model_parallel_size tensor_parallel_degree",
    '"parallel.sequence"': "sequence_parallel",
    "parallel.tensor and the ZeRO stage": "pipeline_model_parallel_size pipeline_parallel_degree",
    "torchrun": "data_parallel_shard_degree devices",
    '"deepspeed.zero_optimization.stage"': "zero_stage",
    "deepspeed.zero_optimization.stage": "use_distributed_optimizer fsdp",
    '"finetune.adapter.rank"': "lora_r",
    '"finetune.adapter.alpha"': "lora_alpha",
    '"finetune.adapter.dropout"': "lora_dropout",
    '"finetune.adapter.targets"': "target_modules",
    "finetune.adapter.targets": "lora_query lora_value",
    '"finetune.task"': "task_type",
    '"finetune.label_smoothing"': "label_smoothing_factor",
    "--init-from": "model_name_or_path initial_checkpoint_dir",
    "--resume": "resume_from_checkpoint load",
}
CASES = [(name, answer) for answer, names in ANSWERS.items() for name in names.split()]


def fault_of(path: Path, sets: list[str]) -> str:
    """Return the only fault of a run file with overrides."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, sets)
    [fault] = caught.value.faults
    return fault


def test_list_of_foreign_names_has_over_60_names() -> None:
    assert len({name for name, _ in CASES}) == len(CASES) > 60


@pytest.mark.parametrize("section", ["", "training"])
@pytest.mark.parametrize(("name", "answer"), CASES)
def test_foreign_name_is_answered_with_the_right_key(
    tmp_path: Path, name: str, answer: str, section: str
) -> None:
    path = tmp_path / "run.json"
    extra = {section: {name: 1}} if section else {name: 1}
    path.write_text(json.dumps(merge_sections(copy.deepcopy(BASE), extra)))
    assert answer in fault_of(path, [])
    path.write_text(json.dumps(BASE))
    key = f"{section}.{name}".lstrip(".")
    fault = fault_of(path, [f"{key}=1"])
    assert fault.startswith(f"--set {key}: unknown key; ")
    assert answer in fault


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("metrics.log_freq", '"training.log_every"'),
        ("parallelism.tensor_parallel_degree", '"parallel.tensor"'),
        ("lr_scheduler.decay_ratio", "schedule.decay_steps"),
        ("train.max_tokens", '"training"; max_tokens: its name here is "training.tokens"'),
        ("checkpoint.interval", '"checkpoint.every"'),
        ("checkpoint.folder", '"logging.directory"'),
        ("activation_checkpoint.mode", "training.activation_checkpointing"),
        ("model.name", "set the sizes in the model section"),
        ("lora.r", '"finetune.adapter.rank"'),
    ],
)
def test_key_of_a_foreign_section_is_answered_with_the_right_key(
    tmp_path: Path, key: str, answer: str
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(BASE))
    assert answer in fault_of(path, [f"{key}=1"])


def test_remedies_name_existing_keys() -> None:
    keys = {dotted(key) for key in known_keys()}
    named = [word for remedy in _OTHERWISE for word in re.findall(r"[a-z]+\.[a-z_.]*[a-z]", remedy)]
    assert len(named) > 30
    deepspeed = {"deepspeed.zero_optimization.stage"}  # known_keys() has no keys of DeepSpeed
    assert set(named) <= keys | deepspeed
