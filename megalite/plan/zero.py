"""DeepSpeed's ZeRO section as one typed value, with MegaLite's defaults."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megalite import arch
from megalite.config import ModelConfig, RunConfig, zero_stage
from megalite.mesh import Mesh

# DeepSpeed's default is 5e8 elements, 2 GB in fp32. 5e7 keep a link just as busy.
_BUCKET = 50_000_000
# Stage 0 has no bucket setting: MEMORY_OPT_ALLREDUCE_SIZE of deepspeed/runtime/engine.py.
_STAGE_0_BUCKET = 500_000_000


@dataclass(frozen=True)
class ZeroSettings:
    """The ZeRO section of a run file, "auto" and missing keys filled in. Sizes are in elements.

    Attributes:
        stage: 0 to 3.
        reduce_bucket_size: gradients per call.
        allgather_bucket_size: updated weights per call of stages 1 and 2.
        prefetch_bucket_size: weights per call of stage 3. 0 means no prefetching.
        overlap_comm: whether gradients are sent while the backward runs.
        offload_optimizer, offload_param: "none", "cpu" or "nvme".
        quantized: the keys that are true and quantize weights.
    """

    stage: int
    reduce_bucket_size: int
    allgather_bucket_size: int
    prefetch_bucket_size: int
    overlap_comm: bool
    offload_optimizer: str
    offload_param: str
    quantized: tuple[str, ...]

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer states are in host memory."""
        return self.offload_optimizer != "none"


def zero_settings(config: RunConfig) -> ZeroSettings:
    """Return the ZeRO settings of a run file."""
    section = without_auto(config.deepspeed).get("zero_optimization", {})
    stage = zero_stage(config)
    tensor = config.parallel.tensor
    trained = _bucket(local_elements(config, tensor, trained=True))
    fetched = _bucket(local_elements(config, tensor))  # frozen weights are fetched as well
    return ZeroSettings(
        stage=stage,
        reduce_bucket_size=int(section.get("reduce_bucket_size", trained))
        if stage
        else _STAGE_0_BUCKET,
        allgather_bucket_size=int(section.get("allgather_bucket_size", trained)),
        prefetch_bucket_size=int(section.get("stage3_prefetch_bucket_size", fetched)),
        overlap_comm=section.get("overlap_comm", stage == 3) is True,
        offload_optimizer=_device(section, "offload_optimizer"),
        offload_param=_device(section, "offload_param"),
        quantized=tuple(
            key
            for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
            if section.get(key) is True
        ),
    )


def without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a DeepSpeed section without the keys whose value is "auto"."""
    return {
        key: without_auto(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in section.items()
        if value != "auto"
    }


def local_elements(config: RunConfig, tensor: int, *, trained: bool = False) -> int:
    """Return the number of parameter elements on one tensor rank, with padding.

    Args:
        tensor: tensor-parallel ranks.
        trained: if true, count only trained parameters.
    """
    if not trained or config.finetune is None:
        return sum(local_sizes(config.model, tensor).values())
    rows = arch.parameters(config.model)
    sizes = local_sizes(config.model, tensor)
    return sum(sizes[row.name] for row in rows if arch.is_trainable(config, row))


@lru_cache(maxsize=64)
def local_sizes(model: ModelConfig, tensor: int) -> dict[str, int]:
    """Return each parameter's number of elements on one of `tensor` tensor ranks."""
    return {
        row.name: math.prod(arch.local_shape(row, Mesh(tensor=tensor).at(0)))
        for row in arch.parameters(model)
    }


def _bucket(elements: int) -> int:
    """Return a bucket size for `elements` elements: even, as DeepSpeed requires."""
    return min(_BUCKET, max(2, elements + elements % 2))


def _device(section: Mapping[str, Any], key: str) -> str:
    return str((section.get(key) or {}).get("device", "none"))
