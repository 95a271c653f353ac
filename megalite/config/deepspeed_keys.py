"""Faults of the `deepspeed` section, checked without importing DeepSpeed or torch.

DeepSpeed 0.19 silently ignores an unknown top-level key, so a run with `gradient_cliping` would
train unclipped; here it is a fault. A key that MegaLite sets may be omitted, be "auto" or have
MegaLite's value; another value is a fault. A key without effect on a MegaLite run is a fault too,
unless its value is the one that takes effect anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalite.config.deepspeed_tables import CHOICES, IDLE_VALUES, KINDS, KNOWN, REFUSED
from megalite.config.faults import ConfigFault, fault, show
from megalite.config.schema import RunConfig
from megalite.errors import nearest


def zero_stage(config: RunConfig) -> int:
    """Return the ZeRO stage of a run, 0 to 3; 1 if the section has none."""
    stage = _at(config.deepspeed, "zero_optimization.stage")
    return int(stage) if stage in (0, 1, 2, 3) else 1


def owned_values(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """Return the DeepSpeed keys that MegaLite sets: the only valid value, and its source.

    The source is a key of the run file, or "nothing: " and a reason if no key changes the value.
    `megalite.plan` adds the keys that depend on the number of ranks or on the device.
    """
    stage = zero_stage(config)
    training = config.training
    mean = stage == 3  # stage 3 refuses "sum" (runtime/config.py, _do_error_check)
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
        "bf16.check_grad_overflow": (True, "nothing: non-finite updates are skipped"),
        "fp16.fp16_master_weights_and_grads": (False, "nothing: masters are fp32"),
        "fp16.auto_cast": (False, "training.precision"),
        "zero_optimization.compute_grad_norm": (True, "nothing: the norm is logged"),
    }
    if training.precision != "auto":
        for name in ("bf16", "fp16"):
            owned[f"{name}.enabled"] = (training.precision == name, "training.precision")
        owned["data_types.param_dtype"] = (training.precision, "training.precision")
    if config.optimizer.name != "adamw":  # DeepSpeed's list of tested optimizers has Adam only
        owned["zero_allow_untested_optimizer"] = (True, "optimizer.name")
    return owned


def deepspeed_faults(config: RunConfig) -> Iterator[ConfigFault]:
    """Yield the unknown, mistyped, refused and contradicting keys of the `deepspeed` section."""
    section = config.deepspeed
    yield from _key_faults(section, "")
    yield from _silent_faults(section)
    stage = _at(section, "zero_optimization.stage")
    if stage not in (None, "auto", 0, 1, 2, 3):
        text = f"expected 0, 1, 2 or 3, got {show(stage)}; set it to one of them"
        yield fault("deepspeed.zero_optimization.stage", text)
    for key, (value, source) in owned_values(config).items():
        stated = _at(section, key)
        if stated is not None and not _agrees(stated, value):
            yield fault(
                f"deepspeed.{key} {source if '.' in source and ' ' not in source else ''}",
                contradiction(stated, value, source),
            )
    if config.training.precision == "auto":
        for name in ("bf16", "fp16"):
            if isinstance(_at(section, f"{name}.enabled"), bool):
                yield fault(
                    f"deepspeed.{name}.enabled training.precision",
                    "training.precision decides it, and is auto; set training.precision to fp32, "
                    "bf16 or fp16, and remove this key",
                )


def contradiction(stated: Any, value: Any, source: str) -> str:
    """Return the fault of a key whose stated value differs from the one that MegaLite sets."""
    if source.startswith("nothing"):
        return f"got {show(stated)}, but MegaLite needs {show(value)} ({source[9:]}); remove it"
    return (
        f"got {show(stated)}, but {source} sets it to {show(value)}; change {source}, and remove "
        "this key"
    )


def _agrees(stated: Any, value: Any) -> bool:
    same = stated == value and isinstance(stated, bool) == isinstance(value, bool)  # 1 is not true
    return same or stated == "auto"


def _at(section: dict[str, Any], key: str) -> Any:
    value: Any = section
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _silent_faults(section: dict[str, Any]) -> Iterator[ConfigFault]:
    """Yield keys whose output DeepSpeed logs at level "info" if `log_level` is higher."""
    if section.get("log_level") not in ("debug", "info"):
        cause = 'prints nothing unless deepspeed.log_level is "info"'
        remedy = "or set deepspeed.log_level"
        if section.get("steps_per_print", "auto") != "auto":
            text = f"{cause}; remove it and set training.log_every, {remedy}"
            yield fault("deepspeed.steps_per_print", text)
        if section.get("dump_state") is True:
            yield fault("deepspeed.dump_state", f"{cause}; remove it, {remedy}")
    logger = section.get("comms_logger")
    if isinstance(logger, dict) and logger.get("enabled") is True:
        verbose = logger.get("verbose") is True
        if not verbose or section.get("log_level") not in ("debug", "info"):
            text = 'prints nothing without "verbose": true in it and deepspeed.log_level "info"'
            yield fault("deepspeed.comms_logger", f"{text}; set both, or remove it")


def _key_faults(section: dict[str, Any], at: str) -> Iterator[ConfigFault]:
    """Yield the faults of the keys of one section and of its subsections."""
    kinds = KNOWN[at]
    for key, value in section.items():
        path = f"{at}.{key}".removeprefix(".")
        full = ("deepspeed", *at.split("."), key) if at else ("deepspeed", key)
        reason = REFUSED.get(path)
        if reason is not None:
            if value != "auto" and not _is_idle(path, value):
                yield ConfigFault((full,), reason)
        elif key not in kinds:
            yield ConfigFault((full,), f"unknown key{_hint(key, at)}")
        elif value != "auto":
            text = _kind_fault(path, kinds[key], value)
            if text:
                yield ConfigFault((full,), text)
            elif path in KNOWN:
                yield from _key_faults(value, path)


def _is_idle(path: str, value: Any) -> bool:
    """Return whether the value of a key without effect is the one that takes effect anyway."""
    if path not in IDLE_VALUES:
        return False
    idle = IDLE_VALUES[path]
    return bool(value == idle) and isinstance(value, bool) == isinstance(idle, bool)


def _hint(key: str, at: str) -> str:
    """Return the remedy for an unknown key: its section, the nearest name, or to remove it."""
    homes = [home for home, keys in KNOWN.items() if key in keys]
    if len(homes) == 1:
        place = ".".join(part for part in ("deepspeed", homes[0], key) if part)
        return f'; write it as "{place}"'
    remedy = " of DeepSpeed 0.19.8; remove it"
    return nearest(key, KNOWN[at]) or (
        f"{remedy}, or write one of {', '.join(KNOWN[at])}"
        if at and len(KNOWN[at]) < 12
        else remedy
    )


def _kind_fault(path: str, kind: str, value: Any) -> str:
    """Return the fault of a value of a known key; "" if there is none."""
    expected, _, fits = KINDS[kind[0]]
    least = kind[1:]
    if path in CHOICES:
        if value not in CHOICES[path]:
            names = ", ".join(f'"{name}"' for name in CHOICES[path])
            return f'expected one of {names} or "auto", got {show(value)}; set it to one of them'
    elif not fits(value):
        return f'expected {expected} or "auto", got {show(value)}; change or remove it'
    elif least and value < int(least):
        return f"expected {expected} of {least} or more, got {show(value)}; change or remove it"
    return ""
