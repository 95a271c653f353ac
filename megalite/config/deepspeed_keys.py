"""What the `deepspeed` section may say, known without importing DeepSpeed or torch.

DeepSpeed 0.19 ignores an unknown top-level key without a word, so `gradient_cliping` would train
unclipped; here it is a fault. What MegaLite owns may be left out, be "auto", or agree: a section
that says otherwise is a fault too. Keys and defaults are those of 0.19.8, from
deepspeed/runtime/{config,constants,precision_config}.py and runtime/zero/*config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megalite.config.faults import Fault, fault, show
from megalite.config.schema import RunConfig
from megalite.errors import nearest


def _keys(**kinds: str) -> dict[str, str]:
    """Each key with its kind, of the keys of each kind."""
    return {key: kind for kind, keys in kinds.items() for key in keys.split()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and float(value).is_integer()  # DeepSpeed takes 5e8 for one


# Kinds of values: in words, as a JSON schema, and whether a value is of the kind. In the tables of
# keys below a kind may end in 0 or 1, the least a number of it may be.
_TYPES = ("fp32", "bf16", "fp16")
_KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Any], bool]]] = {
    "b": ("true or false", {"type": "boolean"}, lambda value: isinstance(value, bool)),
    "i": ("a whole number", {"type": "number"}, _is_whole),
    "e": (
        "an even number",
        {"type": "number", "multipleOf": 2},
        lambda value: _is_whole(value) and value % 2 == 0,
    ),
    "f": ("a number", {"type": "number"}, _is_number),
    "s": ("text in quotes", {"type": "string"}, lambda value: isinstance(value, str)),
    "t": ('"fp32", "bf16" or "fp16"', {"enum": [*_TYPES]}, lambda value: value in _TYPES),
    "d": ("a section {...}", {"type": "object"}, lambda value: isinstance(value, dict)),
    "x": ("anything", {}, lambda value: True),
}

_TOP = _keys(
    i1="train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
    "steps_per_print vocabulary_size",
    b="managed_gradient_accumulation dump_state disable_python_gc disable_allgather "
    "prescale_gradients zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
    "wall_clock_breakdown memory_breakdown dataloader_drop_last use_data_before_expert_parallelism",
    t="communication_data_type seq_parallel_communication_data_type",
    f="gradient_predivide_factor",
    s="gradient_allreduce_op log_level",
    f0="gradient_clipping",
    d="zero_optimization bf16 fp16 torch_autocast data_types optimizer scheduler "
    "activation_checkpointing comms_logger flops_profiler tensorboard wandb csv_monitor comet "
    "timers aio checkpoint datastates_ckpt compile",
)

_NESTED = {
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
    "data_types": _keys(t="grad_accum_dtype param_dtype buffer_dtype", x="keep_in_fp32_modules"),
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
}

_GONE = "was taken out of DeepSpeed 0.19, which refuses it"
_GONE_ALONE = (
    "compression_training curriculum_learning eigenvalue graph_harvesting nebula "
    "progressive_layer_drop quantize_training sparse_attention sparse_gradients "
    "zero_optimization.mics_shard_size zero_optimization.mics_hierarchical_params_gather "
    "zero_optimization.zeropp_loco_param"
)
_OWN = "MegaLite does this itself"
REFUSED = dict.fromkeys(_GONE_ALONE.split(), f"{_GONE}; take it out") | {
    # known, and never right here: why, and what to do
    "amp": f"{_GONE}; set training.precision",
    "autotuning": "starts other runs in the place of this one; take it out",
    "bfloat16": 'is the old name; write "bf16"',
    "data_efficiency": f"{_OWN}: the order of data belongs to the data section; take it out",
    "elasticity": f"{_GONE}; a run resumes on another number of ranks without it",
    "expert_parallel": "is for mixtures of experts, which MegaLite does not build; take it out",
    "hybrid_engine": "is for reinforcement learning from feedback; take it out",
    "pipeline": "is for DeepSpeed's PipelineModule, which MegaLite does not build; take it out",
    "sequence_parallel_size": f"{_OWN}; set parallel.sequence",
    "tensor_parallel": f"{_OWN}; set parallel.tensor",
    "weight_quantization": "is for inference; take it out",
    "optimizer": f"{_OWN}; set the optimizer section of the run file",
    "scheduler": f"{_OWN}; set the schedule section of the run file",
    "zero_optimization.cpu_offload": "is the old name; write offload_optimizer",
    "zero_optimization.cpu_offload_param": "is the old name; write offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "is the old name; write offload_optimizer",
    "zero_optimization.zenflow": "cannot sum gradients, which MegaLite needs; take it out",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "is the old name; write "
    "stage3_gather_16bit_weights_on_model_save",
}


def deepspeed_schema() -> dict[str, Any]:
    """The JSON schema of the section, for completion in an editor."""

    def value(kind: str) -> dict[str, Any]:
        least = {"minimum": int(kind[1:])} if kind[1:] else {}
        return {"anyOf": [_KINDS[kind[0]][1] | least, {"const": "auto"}]}

    def section(known: dict[str, str]) -> dict[str, Any]:
        properties = {key: value(kind) for key, kind in known.items() if key not in REFUSED}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    whole = section(_TOP)
    for name, known in _NESTED.items():
        whole["properties"][name] = section(known)
    whole["properties"]["zero_optimization"]["properties"]["stage"] = {"enum": [0, 1, 2, 3, "auto"]}
    return whole


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage a run asks for: 0 to 3, and 1 where it does not say."""
    stage = _at(config.deepspeed, "zero_optimization.stage")
    return int(stage) if stage in (0, 1, 2, 3) else 1


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
    stage = _at(section, "zero_optimization.stage")
    if stage not in (None, "auto", 0, 1, 2, 3):
        text = f"expected 0, 1, 2 or 3, found {show(stage)}"
        yield fault("deepspeed.zero_optimization.stage", text)
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
    same = found == value and isinstance(found, bool) == isinstance(value, bool)  # 1 is not true
    return same or found == "auto"


def _at(section: dict[str, Any], key: str) -> Any:
    value: Any = section
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _key_faults(section: dict[str, Any], known: dict[str, str], prefix: str) -> Iterator[Fault]:
    for key, value in section.items():
        where = ("deepspeed", *prefix.split(".")[:-1], key)
        reason = REFUSED.get(prefix + key)
        if reason is not None:
            if value != "auto":
                yield Fault((where,), reason)
        elif key not in known:
            hint = nearest(key, known) or "; DeepSpeed 0.19.8 has none of this name, take it out"
            yield Fault((where,), f"unknown key{hint}")
        elif value != "auto":
            kind, least = known[key][0], known[key][1:]
            expected, _, fits = _KINDS[kind]
            if not fits(value):
                text = f'expected {expected} or "auto", found {show(value)}'
                yield Fault((where,), text)
            elif least and value < int(least):
                text = f"expected {expected} of {least} or more, found {show(value)}"
                yield Fault((where,), text)
