"""What the `deepspeed` section may say, known without importing DeepSpeed or torch.

DeepSpeed 0.19 ignores an unknown top-level key without a word, so `gradient_cliping` would train
unclipped; here it is a fault. What MegaLite owns may be left out, be "auto", or agree: a section
that says otherwise is a fault too. Keys and defaults are those of 0.19.8, from
deepspeed/runtime/{config,constants,precision_config}.py and runtime/zero/*config.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalite.config.faults import Fault, fault, show
from megalite.config.schema import RunConfig
from megalite.errors import nearest

# Kinds of values: b true/false, i whole number, e even one, f number, s text, t type of numbers,
# d section, x not checked here. A trailing 0 or 1 is the least a number may be.
_TOP = {
    "train_batch_size": "i1",
    "train_micro_batch_size_per_gpu": "i1",
    "gradient_accumulation_steps": "i1",
    "managed_gradient_accumulation": "b",
    "steps_per_print": "i1",
    "dump_state": "b",
    "disable_python_gc": "b",
    "disable_allgather": "b",
    "communication_data_type": "t",
    "seq_parallel_communication_data_type": "t",
    "prescale_gradients": "b",
    "gradient_predivide_factor": "f",
    "gradient_allreduce_op": "s",
    "gradient_clipping": "f0",
    "zero_optimization": "d",
    "zero_allow_untested_optimizer": "b",
    "zero_force_ds_cpu_optimizer": "b",
    "bf16": "d",
    "fp16": "d",
    "torch_autocast": "d",
    "data_types": "d",
    "optimizer": "d",
    "scheduler": "d",
    "activation_checkpointing": "d",
    "comms_logger": "d",
    "flops_profiler": "d",
    "tensorboard": "d",
    "wandb": "d",
    "csv_monitor": "d",
    "comet": "d",
    "timers": "d",
    "wall_clock_breakdown": "b",
    "memory_breakdown": "b",
    "log_level": "s",
    "aio": "d",
    "checkpoint": "d",
    "datastates_ckpt": "d",
    "compile": "d",
    "dataloader_drop_last": "b",
    "use_data_before_expert_parallelism": "b",
    "vocabulary_size": "i1",
}

_NESTED: dict[str, dict[str, str]] = {
    "bf16": {
        "enabled": "b",
        "immediate_grad_update": "b",
        "check_grad_overflow": "b",
        "bf16_master_weights_and_grads": "b",
        "bf16_optimizer_states": "b",
    },
    "fp16": {
        "enabled": "b",
        "auto_cast": "b",
        "loss_scale": "f0",
        "initial_scale_power": "i0",
        "loss_scale_window": "i1",
        "hysteresis": "i1",
        "consecutive_hysteresis": "b",
        "min_loss_scale": "i1",
        "fp16_master_weights_and_grads": "b",
    },
    "data_types": {
        "grad_accum_dtype": "t",
        "param_dtype": "t",
        "buffer_dtype": "t",
        "keep_in_fp32_modules": "x",
    },
    "zero_optimization": {
        "stage": "i0",
        "contiguous_gradients": "b",
        "reduce_scatter": "b",
        "reduce_bucket_size": "i1",
        "use_multi_rank_bucket_allreduce": "b",
        "allgather_partitions": "b",
        "allgather_bucket_size": "e0",
        "overlap_comm": "b",
        "compute_grad_norm": "b",
        "load_from_fp32_weights": "b",
        "elastic_checkpoint": "b",
        "offload_param": "d",
        "offload_optimizer": "d",
        "sub_group_size": "i0",
        "stage3_prefetch_bucket_size": "i0",
        "stage3_param_persistence_threshold": "i0",
        "stage3_model_persistence_threshold": "i0",
        "stage3_max_live_parameters": "i0",
        "stage3_max_reuse_distance": "i0",
        "stage3_gather_16bit_weights_on_model_save": "b",
        "stage3_module_granularity_threshold": "i0",
        "stage3_use_all_reduce_for_fetch_params": "b",
        "stage3_allgather_sequential": "b",
        "ignore_unused_parameters": "b",
        "legacy_stage1": "b",
        "round_robin_gradients": "b",
        "parameter_alignment": "b",
        "zero_hpz_partition_size": "i0",
        "zero_quantized_weights": "b",
        "zero_quantized_nontrainable_weights": "b",
        "zero_quantized_gradients": "b",
        "memory_efficient_linear": "b",
        "pipeline_loading_checkpoint": "b",
        "override_module_apply": "b",
        "log_trace_cache_warnings": "b",
        "enable_sanity_checks": "b",
        "save_muon_momentum_buffer_in_memory": "b",
        "leaf_module": "d",
    },
}
_KINDS = {
    "b": "true or false",
    "i": "a whole number",
    "e": "an even number",
    "f": "a number",
    "s": "text in quotes",
    "t": '"fp32", "bf16" or "fp16"',
    "d": "a section {...}",
}

_GONE = "was taken out of DeepSpeed 0.19, which refuses it"
_OWN = "MegaLite does this itself"
_REFUSED = {  # known, and never right here: why, and what to do
    "amp": f"{_GONE}; set training.precision",
    "autotuning": "starts other runs in the place of this one; take it out",
    "bfloat16": 'is the old name; write "bf16"',
    "compression_training": f"{_GONE}; take it out",
    "curriculum_learning": f"{_GONE}; take it out",
    "data_efficiency": f"{_OWN}: the order of data belongs to the data section; take it out",
    "eigenvalue": f"{_GONE}; take it out",
    "elasticity": f"{_GONE}; a run resumes on another number of ranks without it",
    "expert_parallel": "is for mixtures of experts, which MegaLite does not build; take it out",
    "graph_harvesting": f"{_GONE}; take it out",
    "hybrid_engine": "is for reinforcement learning from feedback; take it out",
    "nebula": f"{_GONE}; take it out",
    "pipeline": "is for DeepSpeed's PipelineModule, which MegaLite does not build; take it out",
    "progressive_layer_drop": f"{_GONE}; take it out",
    "quantize_training": f"{_GONE}; take it out",
    "sequence_parallel_size": f"{_OWN}; set parallel.sequence",
    "sparse_attention": f"{_GONE}; take it out",
    "sparse_gradients": f"{_GONE}; take it out",
    "tensor_parallel": f"{_OWN}; set parallel.tensor",
    "weight_quantization": "is for inference; take it out",
    "optimizer": f"{_OWN}; set the optimizer section of the run file",
    "scheduler": f"{_OWN}; set the schedule section of the run file",
    "zero_optimization.cpu_offload": "is the old name; write offload_optimizer",
    "zero_optimization.cpu_offload_param": "is the old name; write offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "is the old name; write offload_optimizer",
    "zero_optimization.mics_shard_size": f"{_GONE}; take it out",
    "zero_optimization.mics_hierarchical_params_gather": f"{_GONE}; take it out",
    "zero_optimization.zeropp_loco_param": f"{_GONE}; take it out",
    "zero_optimization.zenflow": "cannot sum gradients, which MegaLite needs; take it out",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "is the old name; write "
    "stage3_gather_16bit_weights_on_model_save",
}


def deepspeed_schema() -> dict[str, Any]:
    """The JSON schema of the section, for completion in an editor."""
    types: dict[str, dict[str, Any]] = {
        "b": {"type": "boolean"},
        "i": {"type": "number"},
        "e": {"type": "number", "multipleOf": 2},
        "f": {"type": "number"},
        "s": {"type": "string"},
        "t": {"enum": ["fp32", "bf16", "fp16"]},
        "d": {"type": "object"},
        "x": {},
    }

    def value(kind: str) -> dict[str, Any]:
        least = {"minimum": int(kind[1:])} if kind[1:] else {}
        return {"anyOf": [types[kind[0]] | least, {"const": "auto"}]}

    def section(known: dict[str, str]) -> dict[str, Any]:
        properties = {key: value(kind) for key, kind in known.items() if key not in _REFUSED}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    whole = section(_TOP)
    for name, known in _NESTED.items():
        whole["properties"][name] = section(known)
    whole["properties"]["zero_optimization"]["properties"]["stage"] = {"enum": [0, 1, 2, 3, "auto"]}
    return whole


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage a run asks for: 0 to 3, and 1 where it does not say."""
    section = config.deepspeed.get("zero_optimization", {})
    stage = section.get("stage", 1) if isinstance(section, dict) else 1
    return 1 if stage == "auto" or stage not in (0, 1, 2, 3) else int(stage)


def owned_values(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """Dotted DeepSpeed keys that are MegaLite's, each with its one value and where it is set.

    What depends on the number of ranks or on the device is added by `megalite.plan`.
    """
    stage, training = zero_stage(config), config.training
    mean = stage == 3  # "sum" is refused there (runtime/config.py, _do_error_check)
    owned: dict[str, tuple[Any, str]] = {
        "train_batch_size": (training.global_batch_size, "training.global_batch_size"),
        "train_micro_batch_size_per_gpu": (training.micro_batch_size, "training.micro_batch_size"),
        "gradient_clipping": (config.optimizer.clip_grad_norm, "optimizer.clip_grad_norm"),
        "gradient_allreduce_op": ("mean" if mean else "sum", "nothing: the loss is normalised"),
        "prescale_gradients": (False, "nothing: the loss is normalised"),
        "gradient_predivide_factor": (1.0, "nothing: the loss is normalised"),
        "managed_gradient_accumulation": (True, "training.global_batch_size"),
        "data_types.grad_accum_dtype": ("fp32", "nothing: gradients accumulate in fp32"),
        "torch_autocast.enabled": (False, "training.precision"),
        "bf16.bf16_master_weights_and_grads": (False, "nothing: masters are fp32"),
        "bf16.bf16_optimizer_states": (False, "nothing: moments are fp32"),
        "bf16.check_grad_overflow": (True, "nothing: what is not finite is left out"),
        "fp16.fp16_master_weights_and_grads": (False, "nothing: masters are fp32"),
        "fp16.auto_cast": (False, "training.precision"),
        "zero_optimization.compute_grad_norm": (True, "nothing: the norm is logged"),
    }
    if training.precision != "auto":
        for name in ("bf16", "fp16"):
            owned[f"{name}.enabled"] = (training.precision == name, "training.precision")
        owned["data_types.param_dtype"] = (training.precision, "training.precision")
    if config.optimizer.name != "adamw":  # DeepSpeed's list of tested optimizers is Adam's kin
        owned["zero_allow_untested_optimizer"] = (True, "optimizer.name")
    return owned


def deepspeed_faults(config: RunConfig) -> Iterator[Fault]:
    """Unknown, mistyped, refused and contradicting keys of the `deepspeed` section."""
    section = config.deepspeed
    yield from _key_faults(section, _TOP, "")
    for name, known in _NESTED.items():
        if isinstance(section.get(name), dict):
            yield from _key_faults(section[name], known, f"{name}.")
    if _at(section, "zero_optimization.stage") not in (None, "auto", 0, 1, 2, 3):
        yield fault(
            "deepspeed.zero_optimization.stage",
            f"expected 0, 1, 2 or 3, found {show(_at(section, 'zero_optimization.stage'))}",
        )
    for key, (value, source) in owned_values(config).items():
        found = _at(section, key)
        if found is not None and not _agrees(found, value):
            yield fault(
                f"deepspeed.{key} {source if '.' in source and ' ' not in source else ''}",
                contradiction(found, value, source),
            )
    if config.training.precision == "auto":
        for name in ("bf16", "fp16"):
            if isinstance(_at(section, f"{name}.enabled"), bool):
                yield fault(
                    f"deepspeed.{name}.enabled training.precision",
                    "is decided by training.precision, which is auto; set that to fp32, bf16 or "
                    'fp16, and take this out or write "auto"',
                )


def contradiction(found: Any, value: Any, source: str) -> str:
    """What to say where the section disagrees with what MegaLite owns."""
    if source.startswith("nothing"):
        return f'found {show(found)}, MegaLite needs {show(value)} ({source[9:]}); write "auto"'
    return (
        f"found {show(found)}, but {source} makes it {show(value)}; change {source}, and take "
        'this out or write "auto"'
    )


def _agrees(found: Any, value: Any) -> bool:
    if found == "auto":
        return True
    if isinstance(found, bool) or isinstance(value, bool):
        return found is value
    return bool(found == value)


def _at(section: dict[str, Any], key: str) -> Any:
    value: Any = section
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _key_faults(section: dict[str, Any], known: dict[str, str], prefix: str) -> Iterator[Fault]:
    for key, value in section.items():
        where = ("deepspeed", *prefix.split(".")[:-1], key)
        reason = _REFUSED.get(prefix + key)
        if reason is not None:
            if value != "auto":
                yield Fault((where,), reason)
        elif key not in known:
            hint = nearest(key, known) or "; DeepSpeed 0.19.8 has none of this name, take it out"
            yield Fault((where,), f"unknown key{hint}")
        elif value != "auto":
            yield from _value_faults(where, value, known[key])


def _value_faults(where: tuple[str, ...], value: Any, kind: str) -> Iterator[Fault]:
    if kind == "x":
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = number and float(value).is_integer()  # DeepSpeed takes 5e8 for a whole number
    fits = {
        "b": isinstance(value, bool),
        "i": whole,
        "e": whole and value % 2 == 0,
        "f": number,
        "s": isinstance(value, str),
        "t": value in ("fp32", "bf16", "fp16"),
        "d": isinstance(value, dict),
    }[kind[0]]
    least = int(kind[1:] or -(2**63))
    expected = _KINDS[kind[0]]
    if not fits:
        yield Fault((where,), f'expected {expected} or "auto", found {show(value)}')
    elif number and value < least:
        yield Fault((where,), f"expected {expected} of {least} or more, found {show(value)}")
