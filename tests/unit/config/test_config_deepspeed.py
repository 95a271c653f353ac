# covers: megalite/config/deepspeed_keys.py megalite/config/deepspeed_tables.py
"""The deepspeed section: keys nobody knows, keys that contradict, and DeepSpeed's own source."""

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
def test_what_is_sound(section: dict[str, Any]) -> None:
    assert parse_config(BASE | {"deepspeed": section}).deepspeed == section


_OWN, _GONE = "MegaLite does this itself", "was taken out of DeepSpeed 0.19, which refuses it"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gradient_cliping", 1.0, 'unknown key; did you mean "gradient_clipping"?'),
        ("qqq", 1, "unknown key; DeepSpeed 0.19.8 has none of this name, remove it"),
        ("zero_optimization.overlap_com", True, 'unknown key; did you mean "overlap_comm"?'),
        (
            "gradient_clipping",
            0.5,
            "found 0.5, but optimizer.clip_grad_norm makes it 1.0; change "
            'optimizer.clip_grad_norm, and remove this or write "auto"',
        ),
        (
            "gradient_allreduce_op",
            "mean",
            'found "mean", MegaLite needs "sum" (the loss is normalised); write "auto"',
        ),
        ("optimizer", {"type": "Lamb"}, f"{_OWN}; set the optimizer section of the run file"),
        ("nebula", {}, f"{_GONE}; remove it"),
        ("zero_optimization.mics_shard_size", 8, f"{_GONE}; remove it"),
        ("bfloat16", {"enabled": True}, 'is the old name; write "bf16"'),
        ("zero_optimization", True, 'expected a section {...} or "auto", found true'),
        ("zero_optimization.stage", 4, "expected 0, 1, 2 or 3, found 4"),
        ("zero_optimization.stage", True, 'expected a whole number or "auto", found true'),
        ("zero_optimization.cpu_offload", True, "is the old name; write offload_optimizer"),
        (
            "zero_optimization.reduce_bucket_size",
            0,
            "expected a whole number of 1 or more, found 0",
        ),
        (
            "zero_optimization.allgather_bucket_size",
            7,
            'expected an even number or "auto", found 7',
        ),
        ("zero_optimization.overlap_comm", 1, 'expected true or false or "auto", found 1'),
        (
            "communication_data_type",
            "float",
            'expected "fp32", "bf16" or "fp16" or "auto", found "float"',
        ),
    ],
)
def test_faults(key: str, value: Any, message: str) -> None:
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
        ("aio", {"block_size": 1048576}, "offloads nothing to NVMe; remove it"),
        ("dataloader_drop_last", True, "the data section fixes the order; remove it"),
        ("disable_allgather", True, "DeepSpeed 0.19 does not read it; remove it"),
        ("use_data_before_expert_parallelism", True, "mixtures of experts"),
        ("vocabulary_size", 50000, "set model.vocab_size"),
        ("seq_parallel_communication_data_type", "bf16", "set parallel.sequence"),
        ("torch_autocast.dtype", "bfloat16", "set training.precision"),
        ("zero_optimization.elastic_checkpoint", True, "load on any number of ranks; remove it"),
        ("zero_optimization.load_from_fp32_weights", False, "hold fp32 weights; remove it"),
        (
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
            True,
            "launcher/export.py writes a model folder; remove it",
        ),
        ("zero_optimization.pipeline_loading_checkpoint", True, "own checkpoints; remove it"),
        ("zero_optimization.legacy_stage1", True, "was taken out of DeepSpeed 0.19"),
        ("zero_optimization.allgather_partitions", False, "does not read it; remove it"),
        ("zero_optimization.offload_optimizer.pipeline_read", True, "nothing to NVMe; remove it"),
        ("steps_per_print", 100, 'set training.log_every, or write "log_level": "info"'),
        ("dump_state", True, 'remove it, or write "log_level": "info"'),
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
def test_key_without_effect_may_say_so(key: str) -> None:
    """Files of other trainers list keys with the value that they have anyway, or with "auto"."""
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
        assert f"{at}.{wrong}: unknown key; " in fault
        assert hint in fault
        assert "remove it" in fault or "did you mean" in fault


@pytest.mark.parametrize("at", KNOWN)
def test_value_of_the_wrong_kind_is_refused_in_every_section(at: str) -> None:
    for key in KNOWN[at]:
        path = f"{at}.{key}".removeprefix(".")
        if path in REFUSED:
            continue
        section: Any = {key: [1]}  # a list of a number: of no kind
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
def test_message_names_the_key_that_is_meant(section: Any, message: str) -> None:
    [fault] = faults(section)
    assert message in fault


def test_a_section_that_is_none() -> None:
    [fault] = faults([])
    assert fault.startswith(": expected a section {...}, found []; it is: DeepSpeed's own JSON")


def test_precision_is_decided_in_one_place() -> None:
    [fault] = faults({"bf16": {"enabled": True}}, precision="auto")
    assert "is decided by training.precision, which is auto" in fault
    [fault] = faults({"bf16": {"enabled": True}}, precision="fp32")
    assert "found true, but training.precision makes it false" in fault
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
def test_zero_stage(section: dict[str, Any], stage: int) -> None:
    assert zero_stage(parse_config(BASE | {"deepspeed": section})) == stage


# --- the tables against the source of the DeepSpeed that is installed --------------------------


def deepspeed_source(path: str) -> str:
    found = importlib.metadata.distribution("deepspeed").locate_file(f"deepspeed/{path}")
    return Path(str(found)).read_text()


def fields_of(source: str, name: str) -> set[str]:
    """Return the keys a pydantic model of DeepSpeed reads: a field's alias, else its name."""
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
def test_nested_keys_are_deepspeeds(section: str, path: str, model: str) -> None:
    ours = set(KNOWN[section])
    theirs = fields_of(deepspeed_source(path), model)
    refused = {k.removeprefix(f"{section}.") for k in REFUSED if k.startswith(f"{section}.")}
    assert ours <= theirs
    assert theirs <= ours | refused


def test_other_keys_are_deepspeeds() -> None:
    """Of sections that DeepSpeed reads key by key, and not with a model of pydantic."""
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


def test_what_deepspeed_has_removed_is_refused() -> None:
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
