"""DeepSpeed's JSON: defaults are written out before the start, and values compared after it.

DeepSpeed has a default for each missing key, and the defaults change between releases.
`fill_defaults` adds those of the installed release, so that the file in the run folder is complete.
`verify_effective` compares it with the values that the engine really uses.

Files that comments name are those of DeepSpeed 0.19.8, below deepspeed/.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import deepspeed
import pydantic
from deepspeed.runtime import compiler
from deepspeed.runtime.config import DeepSpeedConfig

from megalite.config import Precision
from megalite.errors import ConfigError, EngineError
from megalite.parallel import Grid


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which every engine of DeepSpeed imports, without torch.compile.

    It decorates functions with torch.compile (runtime/zero/muon/original_muon.py). That would
    import the compiler, which takes 0.8 s. MegaLite does not use this Muon.
    """
    original = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = original


_import_muon()

# top-level keys that are attributes of DeepSpeedConfig (runtime/config.py) under the same name
_SCALARS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "gradient_clipping",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "prescale_gradients",
    "communication_data_type",
    "disable_allgather",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "disable_python_gc",
    "dataloader_drop_last",
)
_MODELS = {
    "zero_optimization": "zero_config",
    "fp16": "float16_config",
    "bf16": "bfloat16_config",
    "compile": "compile_config",
    "timers": "timers_config",
}
_OBJECTS = {
    "activation_checkpointing": "activation_checkpointing_config",
    "flops_profiler": "flops_profiler_config",
}
_DTYPE_NAMES = {precision.torch: precision.value for precision in Precision}


class Mpu:
    """The grid with the interface that DeepSpeed expects (Megatron-LM's `mpu`; utils/bwc.py)."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def get_model_parallel_rank(self) -> int:
        return self._grid.at.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._grid.mesh.tensor

    def get_model_parallel_group(self) -> Any:
        return self._grid.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self._grid.at.zero_rank

    def get_data_parallel_world_size(self) -> int:
        return self._grid.mesh.zero

    def get_data_parallel_group(self) -> Any:
        return self._grid.zero_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def init_deepspeed() -> None:
    """Make DeepSpeed use the existing process group.

    Its shared-memory collectives (comm/torch.py: build_shm_op) stay off, because they need a
    compiler at run time, and gloo is as fast.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_relevant)
    # torch warns at each call of renamed collectives; users cannot change DeepSpeed's calls
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger"
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)


def _is_relevant(record: logging.LogRecord) -> bool:
    """Return false for the warning about optimizers other than Adam (runtime/engine.py).

    MegaLite's parity tests cover these optimizers.
    """
    return "untested optimizer" not in record.getMessage()


def fill_defaults(settings: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """Return `settings` with every default of the installed DeepSpeed written out.

    Raises:
        ConfigError: DeepSpeed refuses a value, or one of its sections has an unknown key.
    """
    init_deepspeed()
    try:
        parsed = DeepSpeedConfig(dict(settings), mpu=Mpu(grid))
    except pydantic.ValidationError as error:
        raise ConfigError([_fault(entry, error.title) for entry in error.errors()]) from None
    except (ValueError, AssertionError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"deepspeed: DeepSpeed refuses the section: {error}") from None
    full = dict(settings)
    for key in _SCALARS:
        value = getattr(parsed, key)
        if value is not None:
            full[key] = _DTYPE_NAMES.get(value, value)
    for key, attribute in _MODELS.items():
        full[key] = _dump(getattr(parsed, attribute))
    for key, attribute in _OBJECTS.items():
        full[key] = dict(vars(getattr(parsed, attribute)))
    accumulate = {"grad_accum_dtype": parsed.grad_accum_dtype, "param_dtype": parsed.param_dtype}
    full["data_types"] = {k: v for k, v in accumulate.items() if v is not None}
    return dict(json.loads(json.dumps(full)))


def defaults(grid: Grid) -> dict[str, Any]:
    """Return all defaults of the installed DeepSpeed."""
    return fill_defaults({"train_micro_batch_size_per_gpu": 1}, grid)


def verify_effective(settings: Mapping[str, Any], engine: Any) -> None:
    """Compare the values that the engine uses with those of the settings.

    Raises:
        EngineError: some values differ; the message lists them.
    """
    used = _effective(engine)
    differing = [
        f"deepspeed.{key}: requested {value!r}, but the engine uses {used[key]!r}"
        for key, value in _requested(settings, used).items()
        if used[key] != value
    ]
    if differing:
        raise EngineError("\n".join(differing))


def _effective(engine: Any) -> dict[str, Any]:
    """Return the values that the engine and its optimizer report, by dotted key."""
    stage = int(engine.zero_optimization_stage())
    used = {
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "gradient_allreduce_op": "mean" if engine.gradient_average else "sum",
        "zero_optimization.stage": stage,
        "fp16.enabled": bool(engine.fp16_enabled()),
        "bf16.enabled": bool(engine.bfloat16_enabled()),
    }
    model_dtype, accumulate_dtype = engine.get_data_types()
    used["data_types.grad_accum_dtype"] = _DTYPE_NAMES[accumulate_dtype]
    first = next(engine.module.parameters())
    assert first.dtype == model_dtype, f"parameters are {first.dtype}, not {model_dtype}"
    if stage > 0:
        used["zero_optimization.reduce_bucket_size"] = int(engine.zero_reduce_bucket_size())
        used["optimizer clipping"] = engine.optimizer.clip_grad
    if stage == 3:
        fetcher = engine.optimizer.parameter_offload
        used["zero_optimization.stage3_param_persistence_threshold"] = int(
            fetcher.param_persistence_threshold
            if hasattr(fetcher, "param_persistence_threshold")
            else engine.zero_param_persistence_threshold()
        )
    return used


def _requested(settings: Mapping[str, Any], used: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `settings` for the keys that `_effective` reports."""
    requested: dict[str, Any] = {}
    for key in used:
        if key == "optimizer clipping":
            requested[key] = settings["gradient_clipping"]
            continue
        value: Any = settings
        for part in key.split("."):
            value = value.get(part, {}) if isinstance(value, Mapping) else value
        if value != {}:
            requested[key] = value
    return requested


def _dump(model: pydantic.BaseModel) -> dict[str, Any]:
    """Return a DeepSpeed section under its JSON names, without deprecated fields."""
    fields = type(model).model_fields
    current = {
        name
        for name, field in fields.items()
        if not (
            isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated")
        )
    }
    return model.model_dump(mode="json", by_alias=True, exclude_none=True, include=current)


def _fault(entry: Any, title: str) -> str:
    where = ".".join(str(part) for part in entry["loc"])
    return f"deepspeed: {title.removeprefix('DeepSpeed')} {where}: {entry['msg']}"
