# covers: megalite/config/deepspeed_keys.py megalite/config/deepspeed_tables.py
"""Faults of the deepspeed section, and its tables compared with DeepSpeed's own source."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from megalite.config import parse_config, zero_stage
from megalite.config.deepspeed_tables import IDLE_VALUES, KNOWN, REFUSED
from megalite.errors import ConfigError
from tests.helpers.runs import BASE


def faults(section: Any, **training: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE | {"deepspeed": section, "training": BASE["training"] | training})
    return [fault.removeprefix("the run file: deepspeed") for fault in caught.value.faults]


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"zero_optimization": "auto", "bf16": "auto", "optimizer": "auto", "data_types": "auto"},
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8}},
        {"gradient_clipping": 1, "train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto"},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
        {"gradient_allreduce_op": "sum", "data_types": {"grad_accum_dtype": "fp32"}},
        {"gradient_allreduce_op": "mean", "zero_optimization": {"stage": 3}},
        {"fp16": {"enabled": "auto", "initial_scale_power": 12}, "bf16": {"enabled": "auto"}},
        {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True, "output_path": "x"}},
        {"comms_logger": {"enabled": True, "verbose": True}, "log_level": "info"},
        {"comms_logger": {"enabled": False, "prof_all": True}, "dump_state": False},
        {"communication_data_type": "bf16", "wall_clock_breakdown": True},
        {"steps_per_print": 10, "dump_state": True, "log_level": "debug"},
        {"steps_per_print": "auto", "torch_autocast": {"enabled": False}},
        {"flops_profiler": {"enabled": True, "profile_step": 1, "output_file": None}},
        {"timers": {"throughput": {"enabled": True, "synchronized": False}}},
        {"data_types": {"keep_in_fp32_modules": ["norm"], "buffer_dtype": "fp32"}},
        {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["a.B"]}}},
    ],
)
def test_deepspeed_section_accepts_valid_keys(section: dict[str, Any]) -> None:
    assert parse_config(BASE | {"deepspeed": section}).deepspeed == section


_CHANGE = "; change or remove it"
_OWN, _REMOVED = "MegaLite does this itself", "DeepSpeed 0.19 no longer has it, and refuses it"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gradient_cliping", 1.0, 'unknown key; did you mean "gradient_clipping"?'),
        ("qqq", 1, "unknown key of DeepSpeed 0.19.8; remove it"),
        ("zero_optimization.overlap_com", True, 'unknown key; did you mean "overlap_comm"?'),
        (
            "gradient_clipping",
            0.5,
            "got 0.5, but optimizer.clip_grad_norm sets it to 1.0; change "
            "optimizer.clip_grad_norm, and remove this key",
        ),
        (
            "gradient_allreduce_op",
            "mean",
            'got "mean", but MegaLite needs "sum" (the loss is normalised); remove it',
        ),
        ("optimizer", {"type": "Lamb"}, f"{_OWN}; set the optimizer section of the run file"),
        ("nebula", {}, f"{_REMOVED}; remove it"),
        ("zero_optimization.mics_shard_size", 8, f"{_REMOVED}; remove it"),
        ("bfloat16", {"enabled": True}, 'is the old name; write "bf16"'),
        ("zero_optimization", True, f'expected a section {{...}} or "auto", got true{_CHANGE}'),
        ("zero_optimization.stage", 4, "expected 0, 1, 2 or 3, got 4; set it to one of them"),
        ("zero_optimization.stage", True, f'expected a whole number or "auto", got true{_CHANGE}'),
        ("zero_optimization.cpu_offload", True, "is the old name; write offload_optimizer"),
        (
            "zero_optimization.reduce_bucket_size",
            0,
            f"expected a whole number of 1 or more, got 0{_CHANGE}",
        ),
        (
            "zero_optimization.allgather_bucket_size",
            7,
            f'expected an even number or "auto", got 7{_CHANGE}',
        ),
        ("zero_optimization.overlap_comm", 1, f'expected true or false or "auto", got 1{_CHANGE}'),
        (
            "communication_data_type",
            "float",
            f'expected "fp32", "bf16" or "fp16" or "auto", got "float"{_CHANGE}',
        ),
    ],
)
def test_deepspeed_fault_states_value_and_remedy(key: str, value: Any, message: str) -> None:
    section = value
    for part in reversed(key.split(".")):
        section = {part: section}
    assert faults(section) == [f".{key}: {message}"]


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("activation_checkpointing", {"partition_activations": True}, "training.activation_check"),
        ("checkpoint", {"tag_validation": "Fail"}, "set the checkpoint section of the run file"),
        ("datastates_ckpt", {"no_such_key": True}, "set checkpoint.background"),
        ("compile", {"deepcompile": True}, "set training.compile"),
        ("aio", {"block_size": 1048576}, "does not offload to NVMe; remove it"),
        ("dataloader_drop_last", True, "the data section fixes the order; remove it"),
        ("disable_allgather", True, "has no effect in DeepSpeed 0.19; remove it"),
        ("use_data_before_expert_parallelism", True, "mixtures of experts"),
        ("vocabulary_size", 50000, "set model.vocab_size"),
        ("seq_parallel_communication_data_type", "bf16", "set parallel.sequence"),
        ("torch_autocast.dtype", "bfloat16", "set training.precision"),
        ("zero_optimization.elastic_checkpoint", True, "load on any number of ranks; remove it"),
        ("zero_optimization.load_from_fp32_weights", False, "hold fp32 weights; remove it"),
        (
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
            True,
            "own checkpoints; remove it, and use megalite export",
        ),
        ("zero_optimization.pipeline_loading_checkpoint", True, "own checkpoints; remove it"),
        ("zero_optimization.legacy_stage1", True, "DeepSpeed 0.19 no longer has it"),
        ("zero_optimization.allgather_partitions", False, "no effect in DeepSpeed 0.19; remove it"),
        ("zero_optimization.offload_optimizer.pipeline_read", True, "offload to NVMe; remove it"),
        ("steps_per_print", 100, "set training.log_every, or set deepspeed.log_level"),
        ("dump_state", True, "remove it, or set deepspeed.log_level"),
        ("comms_logger", {"enabled": True}, 'prints nothing without "verbose": true'),
        ("comms_logger", {"enabled": True, "verbose": True}, 'deepspeed.log_level "info"'),
    ],
)
def test_key_without_effect_is_refused(key: str, value: Any, remedy: str) -> None:
    section = value
    for part in reversed(key.split(".")):
        section = {part: section}
    [fault] = faults(section)
    assert fault.startswith(f".{key}: ")
    assert remedy in fault


@pytest.mark.parametrize("key", IDLE_VALUES)
def test_key_without_effect_may_have_the_value_that_takes_effect(key: str) -> None:
    """Files for other trainers contain such keys, with DeepSpeed's default or with "auto"."""
    for value in (IDLE_VALUES[key], "auto"):
        section = value
        for part in reversed(key.split(".")):
            section = {part: section}
        assert parse_config(BASE | {"deepspeed": section}).deepspeed == section


@pytest.mark.parametrize("at", KNOWN)
def test_unknown_key_of_every_section_is_refused(at: str) -> None:
    keys = [key for key in KNOWN[at] if f"{at}.{key}".removeprefix(".") not in REFUSED]
    for wrong, hint in ((f"{keys[0]}x", f'did you mean "{keys[0]}"?'), ("no_such_key_at_all", "")):
        section: Any = {wrong: True}
        for part in reversed(at.split(".") if at else []):
            section = {part: section}
        [fault] = faults(section)
        assert f"{at}.{wrong}: unknown key" in fault
        assert hint in fault
        assert "remove it" in fault or "did you mean" in fault


@pytest.mark.parametrize("at", KNOWN)
def test_value_of_the_wrong_kind_is_refused_in_every_section(at: str) -> None:
    for key in KNOWN[at]:
        path = f"{at}.{key}".removeprefix(".")
        if path in REFUSED:
            continue
        section: Any = {key: [1]}  # no key accepts a list of a number
        for part in reversed(at.split(".") if at else []):
            section = {part: section}
        assert any(fault.startswith(f".{path}: expected ") for fault in faults(section)), path


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"stage": 2}, '.stage: unknown key; write it as "deepspeed.zero_optimization.stage"'),
        ({"log_level": "verbose"}, '.log_level: expected one of "debug", "info", "warning"'),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
            '.zero_optimization.offload_optimizer.device: expected one of "none", "cpu", "nvme"',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memry": True}}},
            'offload_optimizer.pin_memry: unknown key; did you mean "pin_memory"?',
        ),
        ({"timers": {"throughput": {"enable": True}}}, 'did you mean "enabled"?'),
    ],
)
def test_message_suggests_the_key_that_was_meant(section: Any, message: str) -> None:
    [fault] = faults(section)
    assert message in fault


def test_deepspeed_section_that_is_a_list_is_refused() -> None:
    [fault] = faults([])
    assert fault.startswith(
        ": expected a section {...}, got []; correct the value; its meaning: DeepSpeed's own JSON"
    )


def test_precision_is_decided_by_the_training_section() -> None:
    [fault] = faults({"bf16": {"enabled": True}}, precision="auto")
    assert "training.precision decides it, and is auto" in fault
    [fault] = faults({"bf16": {"enabled": True}}, precision="fp32")
    assert "got true, but training.precision sets it to false" in fault
    parse_config(
        BASE
        | {"training": BASE["training"] | {"precision": "bf16"}}
        | {"deepspeed": {"bf16": {"enabled": True}, "fp16": {"enabled": False}}}
    )


@pytest.mark.parametrize(
    ("section", "stage"),
    [({}, 1), ({"zero_optimization": {}}, 1), ({"zero_optimization": "auto"}, 1)]
    + [({"zero_optimization": {"stage": stage}}, stage) for stage in range(4)],
)
def test_zero_stage_is_read_or_1(section: dict[str, Any], stage: int) -> None:
    assert zero_stage(parse_config(BASE | {"deepspeed": section})) == stage


# --- the tables compared with the source of the installed DeepSpeed ----------------------------


def deepspeed_source(path: str) -> str:
    file = importlib.metadata.distribution("deepspeed").locate_file(f"deepspeed/{path}")
    return Path(str(file)).read_text()


def fields_of(source: str, name: str) -> set[str]:
    """Return the keys that a pydantic model of DeepSpeed reads: each field's alias or name."""
    [model] = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name]
    result = set()
    for node in model.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            calls = node.value.keywords if isinstance(node.value, ast.Call) else []
            alias = [k.value for k in calls if k.arg == "alias"]
            result |= {str(a.value) for a in alias if isinstance(a, ast.Constant)} or {
                node.target.id
            }
    return result


@pytest.mark.parametrize(
    ("section", "path", "model"),
    [
        ("zero_optimization", "runtime/zero/config.py", "DeepSpeedZeroConfig"),
        ("bf16", "runtime/precision_config.py", "DeepSpeedBF16Config"),
        ("fp16", "runtime/precision_config.py", "DeepSpeedFP16Config"),
        ("comms_logger", "comm/config.py", "CommsLoggerConfig"),
        ("tensorboard", "monitor/config.py", "TensorBoardConfig"),
        ("csv_monitor", "monitor/config.py", "CSVConfig"),
        ("wandb", "monitor/config.py", "WandbConfig"),
        ("comet", "monitor/config.py", "CometConfig"),
        ("timers.throughput", "utils/config.py", "DeepSpeedThroughputTimerConfig"),
        (
            "zero_optimization.offload_param",
            "runtime/zero/offload_config.py",
            "DeepSpeedZeroOffloadParamConfig",
        ),
        (
            "zero_optimization.offload_optimizer",
            "runtime/zero/offload_config.py",
            "DeepSpeedZeroOffloadOptimizerConfig",
        ),
        (
            "zero_optimization.leaf_module",
            "runtime/zero/leaf_module_config.py",
            "DeepSpeedZeroLeafModuleConfig",
        ),
    ],
)
def test_keys_of_a_subsection_are_those_of_deepspeed(section: str, path: str, model: str) -> None:
    ours = set(KNOWN[section])
    theirs = fields_of(deepspeed_source(path), model)
    refused = {k.removeprefix(f"{section}.") for k in REFUSED if k.startswith(f"{section}.")}
    assert ours <= theirs
    assert theirs <= ours | refused


def test_keys_without_a_pydantic_model_are_those_of_deepspeed() -> None:
    """DeepSpeed reads some sections key by key: the names occur as strings in its source."""
    words: set[str] = set()
    for path in (
        "runtime/config.py",
        "runtime/constants.py",
        "runtime/zero/config.py",
        "runtime/precision_config.py",
        "runtime/activation_checkpointing/config.py",
        "runtime/swap_tensor/constants.py",
        "comm/constants.py",
        "datastates/config.py",
        "monitor/config.py",
        "profiling/constants.py",
        "utils/config.py",
    ):
        for node in ast.walk(ast.parse(deepspeed_source(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
    for section in ("", "flops_profiler", "torch_autocast", "data_types", "timers"):
        assert set(KNOWN[section]) <= words


def test_key_that_deepspeed_removed_is_refused() -> None:
    tree = ast.parse(deepspeed_source("runtime/config.py"))
    removed: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            [target] = node.targets
            name = getattr(target, "id", "")
            if name.startswith("_REMOVED"):
                prefix = "zero_optimization." if "ZERO" in name else ""
                words = [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
                removed |= {f"{prefix}{word}" for word in words}
    assert removed
    assert removed <= set(REFUSED)
