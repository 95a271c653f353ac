"""The keys that DeepSpeed 0.19.8 reads, the kinds of their values, and those that are refused here.

Keys and defaults are those of deepspeed/runtime/{config,constants,precision_config}.py,
runtime/zero/*config.py, and the configs of comm, compile, monitor, profiling and utils.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _keys(**kinds: str) -> dict[str, str]:
    """Return the kind of each key, from the keys of each kind."""
    return {key: kind for kind, keys in kinds.items() for key in keys.split()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and float(value).is_integer()  # DeepSpeed accepts 5e8


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# Kinds of values: name in messages, JSON schema, and a function that checks a value. In the tables
# of keys below, a kind may end in 0 or 1, which is the minimum of the number.
_TYPES = ("fp32", "bf16", "fp16")
KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Any], bool]]] = {
    "b": ("true or false", {"type": "boolean"}, lambda value: isinstance(value, bool)),
    "i": ("a whole number", {"type": "number"}, _is_whole),
    "e": (
        "an even number",
        {"type": "number", "multipleOf": 2},
        lambda value: _is_whole(value) and value % 2 == 0,
    ),
    "f": ("a number", {"type": "number"}, _is_number),
    "s": ("text in quotes", {"type": "string"}, _is_text),
    "n": (
        "text in quotes or null",
        {"type": "string"},  # `deepspeed_schema` adds null
        lambda value: value is None or _is_text(value),
    ),
    "l": (
        "a list of texts",
        {"type": "array", "items": {"type": "string"}},
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
    ),
    "t": ('"fp32", "bf16" or "fp16"', {"enum": [*_TYPES]}, lambda value: value in _TYPES),
    "d": ("a section {...}", {"type": "object"}, lambda value: isinstance(value, dict)),
}

# Every section and the keys within it; "" is the top.
KNOWN = {
    "": _keys(
        i1="train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
        "steps_per_print",
        b="managed_gradient_accumulation dump_state disable_python_gc disable_allgather "
        "prescale_gradients zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
        "wall_clock_breakdown memory_breakdown dataloader_drop_last "
        "use_data_before_expert_parallelism",
        t="communication_data_type seq_parallel_communication_data_type",
        f="gradient_predivide_factor",
        s="gradient_allreduce_op log_level",
        f0="gradient_clipping",
        d="zero_optimization bf16 fp16 torch_autocast data_types optimizer scheduler "
        "comms_logger flops_profiler tensorboard wandb csv_monitor comet timers",
    ),
    "bf16": _keys(
        b="enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads "
        "bf16_optimizer_states",
    ),
    "fp16": _keys(
        b="enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
        f0="loss_scale",
        i0="initial_scale_power",
        i1="loss_scale_window hysteresis min_loss_scale",
    ),
    "torch_autocast": _keys(b="enabled"),
    "data_types": _keys(t="grad_accum_dtype param_dtype buffer_dtype", l="keep_in_fp32_modules"),
    "zero_optimization": _keys(
        i0="stage sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
        "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
        "stage3_module_granularity_threshold zero_hpz_partition_size",
        b="contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce "
        "allgather_partitions overlap_comm compute_grad_norm load_from_fp32_weights "
        "elastic_checkpoint stage3_gather_16bit_weights_on_model_save "
        "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
        "ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment "
        "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients "
        "memory_efficient_linear pipeline_loading_checkpoint override_module_apply "
        "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory",
        i1="reduce_bucket_size",
        e0="allgather_bucket_size",
        d="offload_param offload_optimizer leaf_module",
    ),
    "zero_optimization.offload_param": _keys(
        s="device", n="nvme_path", i0="buffer_count buffer_size max_in_cpu", b="pin_memory"
    ),
    "zero_optimization.offload_optimizer": _keys(
        s="device",
        n="nvme_path",
        i0="buffer_count",
        b="pin_memory pipeline_read pipeline_write fast_init super_offload",
        f0="ratio cpuadam_cores_perc",
    ),
    "zero_optimization.leaf_module": _keys(l="classes names name_suffixes"),
    "comms_logger": _keys(b="enabled verbose prof_all debug", l="prof_ops"),
    "flops_profiler": _keys(
        b="enabled detailed",
        f0="recompute_fwd_factor",
        i1="profile_step top_modules",
        i="module_depth",
        n="output_file",
    ),
    "tensorboard": _keys(b="enabled", s="output_path job_name"),
    "csv_monitor": _keys(b="enabled", s="output_path job_name"),
    "wandb": _keys(b="enabled", n="group team", s="project"),
    "comet": _keys(
        b="enabled online",
        i1="samples_log_interval",
        n="project workspace api_key experiment_name experiment_key mode",
    ),
    "timers": _keys(d="throughput"),
    "timers.throughput": _keys(b="enabled synchronized"),
}
CHOICES = {
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
}

_REMOVED = "DeepSpeed 0.19 no longer has it, and refuses it"
_REMOVED_KEYS = (
    "compression_training curriculum_learning eigenvalue graph_harvesting nebula "
    "progressive_layer_drop quantize_training sparse_attention sparse_gradients "
    "zero_optimization.mics_shard_size zero_optimization.mics_hierarchical_params_gather "
    "zero_optimization.zeropp_loco_param"
)
_OWN = "MegaLite does this itself"
_SAVES = "has no effect, because MegaLite writes its own checkpoints"
_NVME = "has no effect, because MegaLite does not offload to NVMe"
_SUPER = "is for Superchips and their optimizer, whose state MegaLite cannot read; remove it"
_OFFLOAD = "zero_optimization.offload_optimizer"
# Keys without effect on a MegaLite run: the value that takes effect anyway, and reason and remedy.
_IDLE: dict[str, tuple[Any, str]] = {
    "dataloader_drop_last": (False, f"{_OWN}: the data section fixes the order; remove it"),
    "disable_allgather": (False, "has no effect in DeepSpeed 0.19; remove it"),
    "seq_parallel_communication_data_type": (
        "fp32",
        f"{_OWN}; set parallel.sequence, and communication_data_type for gradients",
    ),
    "use_data_before_expert_parallelism": (
        False,
        "is for mixtures of experts, which MegaLite does not support; remove it",
    ),
    "zero_optimization.allgather_partitions": (True, "has no effect in DeepSpeed 0.19; remove it"),
    "zero_optimization.elastic_checkpoint": (
        False,
        f"{_SAVES}, which load on any number of ranks; remove it",
    ),
    "zero_optimization.legacy_stage1": (False, f"{_REMOVED}; remove it"),
    "zero_optimization.load_from_fp32_weights": (
        True,
        f"{_SAVES}, which hold fp32 weights; remove it",
    ),
    "zero_optimization.pipeline_loading_checkpoint": (False, f"{_SAVES}; remove it"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": (False, f"{_NVME}; remove it"),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (
        False,
        f"{_SAVES}; remove it, and use megalite export to write a model folder",
    ),
    f"{_OFFLOAD}.nvme_path": (None, f"{_NVME}; remove it"),
    f"{_OFFLOAD}.buffer_count": (4, f"{_NVME}; remove it"),
    f"{_OFFLOAD}.pipeline_read": (False, f"{_NVME}; remove it"),
    f"{_OFFLOAD}.pipeline_write": (False, f"{_NVME}; remove it"),
    f"{_OFFLOAD}.fast_init": (False, f"{_NVME}; remove it"),
    f"{_OFFLOAD}.super_offload": (False, _SUPER),
    f"{_OFFLOAD}.cpuadam_cores_perc": (0.8, _SUPER),
}
IDLE_VALUES = {key: value for key, (value, _) in _IDLE.items()}
REFUSED = (
    dict.fromkeys(_REMOVED_KEYS.split(), f"{_REMOVED}; remove it")
    | {key: why for key, (_, why) in _IDLE.items()}
    | {
        # keys that are never valid here: reason and remedy
        "activation_checkpointing": f"{_OWN}; set training.activation_checkpointing",
        "aio": f"{_NVME}; remove it",
        "amp": f"{_REMOVED}; set training.precision",
        "autotuning": "starts other runs instead of this one; remove it",
        "bfloat16": 'is the old name; write "bf16"',
        "checkpoint": f"{_SAVES}; set the checkpoint section of the run file",
        "compile": f"{_OWN}; set training.compile",
        "data_efficiency": f"{_OWN}: the data section fixes the order; remove it",
        "datastates_ckpt": f"{_SAVES}; set checkpoint.background",
        "elasticity": f"{_REMOVED}; remove it: a run resumes on any number of ranks without it",
        "expert_parallel": "is for mixtures of experts, which MegaLite does not support; remove it",
        "hybrid_engine": "is for reinforcement learning from feedback; remove it",
        "pipeline": "is for DeepSpeed's PipelineModule, which MegaLite does not use; remove it",
        "sequence_parallel_size": f"{_OWN}; set parallel.sequence",
        "tensor_parallel": f"{_OWN}; set parallel.tensor",
        "torch_autocast.dtype": f"{_OWN}; set training.precision",
        "torch_autocast.lower_precision_safe_modules": f"{_OWN}; set training.precision",
        "vocabulary_size": "is only for a warning of DeepSpeed; set model.vocab_size",
        "weight_quantization": "is for inference; remove it",
        "optimizer": f"{_OWN}; set the optimizer section of the run file",
        "scheduler": f"{_OWN}; set the schedule section of the run file",
        "zero_optimization.cpu_offload": "is the old name; write offload_optimizer",
        "zero_optimization.cpu_offload_param": "is the old name; write offload_param",
        "zero_optimization.cpu_offload_use_pin_memory": "is the old name; write offload_optimizer",
        "zero_optimization.zenflow": "cannot sum gradients, as MegaLite requires; remove it",
        "zero_optimization.stage3_gather_fp16_weights_on_model_save": f"{_SAVES}; remove it",
    }
)


def deepspeed_schema() -> dict[str, Any]:
    """Return the JSON schema of the section, for completion in an editor."""

    def value(path: str, kind: str) -> dict[str, Any]:
        if path in KNOWN:
            return section(path)
        choices = CHOICES.get(path)
        least = {"minimum": int(kind[1:])} if kind[1:] else {}
        schema = {"enum": [*choices]} if choices else KINDS[kind[0]][1] | least
        null = [{"type": "null"}] if kind == "n" else []
        return {"anyOf": [schema, *null, {"const": "auto"}]}

    def section(at: str) -> dict[str, Any]:
        paths = {key: f"{at}.{key}".removeprefix(".") for key in KNOWN[at]}
        properties = {
            key: value(path, KNOWN[at][key]) for key, path in paths.items() if path not in REFUSED
        }
        return {"type": "object", "properties": properties, "additionalProperties": False}

    whole = section("")
    whole["properties"]["zero_optimization"]["properties"]["stage"] = {"enum": [0, 1, 2, 3, "auto"]}
    return whole
