"""Derived sizes: data-parallel ranks, accumulation steps, tokens per step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megalite import arch
from megalite.config import Precision, RunConfig, allowed_tensor_sizes
from megalite.config.deepspeed_keys import contradiction
from megalite.config.tasks import find_task
from megalite.errors import ConfigError
from megalite.mesh import Mesh
from megalite.plan.flops import run_flops_per_token
from megalite.plan.precision import resolve_precision
from megalite.plan.zero import ZeroSettings, without_auto, zero_settings

_LABELS = 2  # a classifier's, until its examples are read


@dataclass(frozen=True)
class Plan:
    """The sizes of a run: batch sizes in samples, memory in bytes per rank."""

    world_size: int
    tensor_parallel: int
    data_parallel: int
    zero: ZeroSettings
    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    sequence_length: int
    tokens_per_step: int
    precision: Precision
    parameters: int
    flops_per_token: int
    memory_bytes: dict[str, int]

    @property
    def mesh(self) -> Mesh:
        """Parallel axes of the run."""
        return Mesh(data=self.data_parallel, tensor=self.tensor_parallel)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return self.zero.stage


def resolve_labels(config: RunConfig) -> RunConfig:
    """Return the run file with a number of labels, if it trains a classifier.

    The number follows from the labels or class weights of the file. Without them it is a
    placeholder, because the examples decide.
    """
    tuning = config.finetune
    if tuning is None or not find_task(tuning.task).has_labels or config.model.num_labels:
        return config
    labels = len(tuning.data.labels or tuning.class_weights or ()) or _LABELS
    model = config.model.model_copy(update={"num_labels": labels})
    return config.model_copy(update={"model": model})


def layout_plan(
    config: RunConfig,
    *,
    world_size: int,
    device: Literal["cpu", "cuda"],
    native_bf16: bool | None = None,
) -> Plan:
    """Return the plan of a run on `world_size` ranks, without its memory.

    Args:
        native_bf16: whether a "cpu" has units for bf16. None means that this host decides.
    Raises:
        ConfigError: ranks, heads or batches do not divide; or the precision or a DeepSpeed value
            contradicts the ranks, the device or this version.
    """
    training = config.training
    tensor = config.parallel.tensor
    precision = resolve_precision(config, device=device, native_bf16=native_bf16)
    faults = list(_layout_faults(config, world_size))
    zero = zero_settings(config)
    data_parallel = max(1, world_size // tensor)
    accumulation = max(1, training.global_batch_size // (training.micro_batch_size * data_parallel))
    if not faults:
        faults += _deepspeed_faults(config, zero, accumulation, precision)
    if faults:
        raise ConfigError(faults)
    length = config.data.sequence_length
    return Plan(
        world_size=world_size,
        tensor_parallel=tensor,
        data_parallel=data_parallel,
        zero=zero,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        accumulation_steps=accumulation,
        sequence_length=length,
        tokens_per_step=training.global_batch_size * length,
        precision=precision,
        parameters=sum(p.elements for p in arch.parameters(config.model)),
        flops_per_token=run_flops_per_token(config),
        memory_bytes={},
    )


def _layout_faults(config: RunConfig, world_size: int) -> Iterator[str]:
    training = config.training
    tensor = config.parallel.tensor
    if world_size % tensor:
        allowed = allowed_tensor_sizes(config.model)
        sizes = [size for size in allowed if world_size % size == 0]
        yield (
            f"parallel.tensor: {tensor} does not divide the {world_size} ranks; "
            f"{_try(sizes)}, or start a multiple of {tensor} ranks"
        )
    else:
        ranks = world_size // tensor
        batch = training.global_batch_size
        unit = training.micro_batch_size * ranks
        if batch % unit:
            nearest = [n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
            advice = _try(nearest)
            if batch % ranks == 0:
                limit = min(training.micro_batch_size, batch // ranks)
                micro_batch = max(n for n in range(1, limit + 1) if batch // ranks % n == 0)
                advice = (
                    f"set training.micro_batch_size to {micro_batch}, which changes no result; or "
                    f"for the global batch {advice}"
                )
            yield (
                f"training.global_batch_size: {batch} is not a multiple of micro_batch_size "
                f"{training.micro_batch_size} x {ranks} data-parallel ranks = {unit}; {advice}"
            )


def _deepspeed_faults(
    config: RunConfig, zero: ZeroSettings, accumulation: int, precision: Precision
) -> Iterator[str]:
    for key, device, allowed in (
        ("offload_param", zero.offload_param, ("none",)),
        ("offload_optimizer", zero.offload_optimizer, ("none", "cpu")),
    ):
        if device not in allowed:
            yield (
                f"deepspeed.zero_optimization.{key}: device {device} is not supported; remove it, "
                "and offload the optimizer to cpu or use more ranks"
            )
    steps = config.deepspeed.get("gradient_accumulation_steps", "auto")
    if steps not in ("auto", accumulation):
        fault = contradiction(steps, accumulation, "training.global_batch_size")
        yield f"deepspeed.gradient_accumulation_steps: {fault}"
    types = without_auto(config.deepspeed).get("data_types", {})
    if types.get("param_dtype", precision) != precision:
        fault = contradiction(types["param_dtype"], precision, "training.precision")
        yield f"deepspeed.data_types.param_dtype: {fault}"
    if precision is not Precision.FP32 and zero.stage == 0:
        yield (
            f"training.precision: {precision} (auto on GPUs) with ZeRO stage 0 keeps no fp32 "
            "master weights; set deepspeed.zero_optimization.stage to 1, or the precision to fp32"
        )


def _try(sizes: list[int]) -> str:
    return "try " + " or ".join(str(size) for size in sizes)
