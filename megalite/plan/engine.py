"""DeepSpeed's JSON: the user's section, the plan's values, and MegaLite's defaults."""

from __future__ import annotations

from typing import Any

from megalite.config import Precision, RunConfig
from megalite.config.deepspeed_keys import owned_values
from megalite.plan.sizes import Plan
from megalite.plan.zero import without_auto


def deepspeed_dict(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the user's section, owned values, and "auto" filled in.

    An "auto" without a value of MegaLite's is omitted, so that DeepSpeed's default applies.
    """
    result = without_auto(config.deepspeed)
    for key, value in _engine_defaults(config, plan).items():
        _put(result, key, value, keep=True)
    for key, (value, _) in owned_values(config).items():
        _put(result, key, value)
    _put(result, "gradient_accumulation_steps", plan.accumulation_steps)
    for name in (Precision.BF16, Precision.FP16):
        _put(result, f"{name}.enabled", plan.precision is name)
    # no param_dtype: the model is built in its dtype, and fp32 runs have no section that needs it
    result["data_types"].pop("param_dtype", None)
    if plan.zero_stage == 0:
        result["gradient_clipping"] = 0.0  # DeepSpeed reports no norm at stage 0, so MegaLite clips
    return result


def _engine_defaults(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Return MegaLite's defaults, for keys that the user's section does not set."""
    bucket = plan.zero.reduce_bucket_size
    defaults: dict[str, Any] = {
        "steps_per_print": 1_000_000_000,  # never: the console and metrics.jsonl report steps
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        # gradients are sums over ranks and micro-batches: 16 bits would lose the precision of fp32
        # accumulation, and fp16 would overflow
        "communication_data_type": Precision.FP32.value,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": config.optimizer.name != "adamw",
        "bf16.check_grad_overflow": True,
        "bf16.immediate_grad_update": True,  # each bf16 gradient is freed once it is added
        "fp16.loss_scale": 0.0,  # 0: dynamic
        "fp16.initial_scale_power": 16,
        "fp16.loss_scale_window": 1000,
        "fp16.hysteresis": 2,
        "fp16.consecutive_hysteresis": False,
        "fp16.min_loss_scale": 1,
        "zero_optimization.stage": plan.zero_stage,
    }
    if plan.zero_stage > 0:
        defaults |= {
            "zero_optimization.contiguous_gradients": True,
            "zero_optimization.reduce_scatter": True,
            "zero_optimization.reduce_bucket_size": bucket,
            "zero_optimization.allgather_bucket_size": plan.zero.allgather_bucket_size,
            "zero_optimization.overlap_comm": plan.zero_stage == 3,
        }
    if plan.zero_stage == 3:
        defaults["zero_optimization.stage3_prefetch_bucket_size"] = plan.zero.prefetch_bucket_size
    return defaults


def _put(target: dict[str, Any], key: str, value: Any, *, keep: bool = False) -> None:
    *sections, name = key.split(".")
    for part in sections:
        target = target.setdefault(part, {})
    if not (keep and name in target):
        target[name] = value
