"""What a run will be, as plain numbers, before a GPU is asked for. Pure: no torch, no devices.

Derived sizes (data-parallel ranks, accumulation, tokens a step) are divided here once and
nowhere else. Legend: n parameters on one tensor rank, d data-parallel ranks, B samples of a
micro-batch, T tokens of a sample, and the letters of `megalite.shapes`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megalite import shapes
from megalite.config import ModelConfig, RunConfig, source_length, target_length, zero_stage
from megalite.config.deepspeed_keys import contradiction, owned_values
from megalite.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]

_LOGIT_ROWS = 1024  # tokens whose logits exist at once in the fused head and loss
# DeepSpeed's buckets are 5e8 elements: 2 GB in fp32. 5e7 keep a link busy just as well.
_BUCKET = 50_000_000
_LIVE_PARAMETERS = 1_000_000_000  # stage3_max_live_parameters of DeepSpeed 0.19
_SUB_GROUP = 1_000_000_000  # sub_group_size
_STAGE_0_BUCKET = 500_000_000  # MEMORY_OPT_ALLREDUCE_SIZE of deepspeed/runtime/engine.py


@dataclass(frozen=True)
class Plan:
    """The sizes of a run. Batch sizes in samples, memory in bytes a rank."""

    world_size: int
    tensor_parallel: int
    data_parallel: int
    zero_stage: int
    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    sequence_length: int
    tokens_per_step: int
    precision: Precision
    parameters: int
    flops_per_token: int
    memory_bytes: dict[str, int]


def make_plan(config: RunConfig, *, world_size: int, device: Literal["cpu", "cuda"]) -> Plan:
    """The plan of `config` on `world_size` ranks.

    Raises:
        ConfigError: ranks, heads or batches that do not divide, with sizes that do; a precision
            or a DeepSpeed value that this number of ranks or this device contradicts.
    """
    training, tensor = config.training, config.parallel.tensor
    precision: Precision
    if training.precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    else:
        precision = training.precision
    faults = list(_layout_faults(config, world_size))
    data_parallel = max(1, world_size // tensor)
    accumulation = max(1, training.global_batch_size // (training.micro_batch_size * data_parallel))
    if not faults:
        faults += _deepspeed_faults(config, accumulation, precision)
    if faults:
        raise ConfigError(faults)
    length = config.data.sequence_length
    plan = Plan(
        world_size=world_size,
        tensor_parallel=tensor,
        data_parallel=data_parallel,
        zero_stage=zero_stage(config),
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        accumulation_steps=accumulation,
        sequence_length=length,
        tokens_per_step=training.global_batch_size * length,
        precision=precision,
        parameters=sum(p.elements for p in shapes.parameters(config.model)),
        flops_per_token=flops_per_token(
            config.model, length, read=source_length(config), written=target_length(config)
        ),
        memory_bytes={},
    )
    return dataclasses.replace(plan, memory_bytes=_memory(config, plan, device))


def flops_per_token(
    model: ModelConfig, sequence_length: int, *, read: int = 0, written: int = 0
) -> int:
    """Model FLOPs of a trained token, forward and backward, without recomputation.

    Each weight of a matrix product (the head also when tied; no embedding look-up) costs 2 in
    the forward and 4 in the backward. Attention's two products cost 2 x 2 x Q for each of the
    (T + 1) / 2 tokens a token sees on average, three times: 6 x layers x Q x (T + 1). After
    PaLM (arXiv 2204.02311, appendix B), with the causal mask counted. Of two stacks each token of
    the window pays its part of what is `read` and `written`.
    """
    width, T = model.num_attention_heads * model.head_dim, sequence_length
    encodes = model.architecture == "encoder_decoder"
    products, scores = 0, 0
    for stack, layers in shapes.stacks(model).items():
        tokens = T if not encodes else written if stack == "model.decoder" else read
        causal = model.architecture == "decoder" or stack == "model.decoder"
        seen = (min(tokens, model.sliding_window or tokens) + 1) if causal else 2 * tokens
        scores += layers * width * tokens * seen
        for row in shapes.parameters(model):
            if row.is_matrix_of_block and row.name.startswith(f"{stack}."):
                of_source = "cross_attn.kv_proj" in row.name
                products += row.elements * (read if of_source else tokens)
        if stack == "model.decoder":
            scores += layers * width * tokens * 2 * read
    products += model.vocab_size * model.hidden_size * (written if encodes else T)
    return 6 * (products + scores) // T


def deepspeed_dict(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """The JSON the DeepSpeed engine gets: the user's section, what MegaLite owns, "auto" filled.

    An "auto" that MegaLite has no value for is left out: DeepSpeed's default holds.
    """
    result = _without_auto(config.deepspeed)
    for key, value in _engine_defaults(config, plan).items():
        _put(result, key, value, keep=True)
    for key, (value, _) in owned_values(config).items():
        _put(result, key, value)
    _put(result, "gradient_accumulation_steps", plan.accumulation_steps)
    for name in ("bf16", "fp16"):
        _put(result, f"{name}.enabled", plan.precision == name)
    # no param_dtype: the model is built in its type, and fp32 runs have no section that asks
    result["data_types"].pop("param_dtype", None)
    if plan.zero_stage == 0:
        result["gradient_clipping"] = 0.0  # DeepSpeed reports no norm there: MegaLite clips
    return result


def _engine_defaults(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """What MegaLite chooses where the user says nothing."""
    bucket = _bucket(config, plan)
    defaults: dict[str, Any] = {
        "steps_per_print": 1_000_000_000,  # the console and metrics.jsonl tell it
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        # gradients are sums over ranks and micro-batches: in 16 bits they would lose what the
        # fp32 accumulation kept, and fp16's would overflow
        "communication_data_type": "fp32",
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
            "zero_optimization.allgather_bucket_size": bucket,
            "zero_optimization.overlap_comm": plan.zero_stage == 3,
        }
    if plan.zero_stage == 3:
        defaults["zero_optimization.stage3_prefetch_bucket_size"] = bucket
    return defaults


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in section.items()
        if value != "auto"
    }


def _put(target: dict[str, Any], key: str, value: Any, *, keep: bool = False) -> None:
    *sections, name = key.split(".")
    for part in sections:
        target = target.setdefault(part, {})
    if not (keep and name in target):
        target[name] = value


def _layout_faults(config: RunConfig, world_size: int) -> Iterator[str]:
    training, tensor = config.training, config.parallel.tensor
    allowed = shapes.allowed_tensor_parallel(config.model)
    if tensor not in allowed:
        yield (
            f"parallel.tensor: {tensor} does not divide the key/value heads "
            f"({config.model.num_key_value_heads}) and the MLP "
            f"({config.model.intermediate_size}); {_try(allowed)}"
        )
    if world_size % tensor:
        sizes = [size for size in allowed if world_size % size == 0]
        yield (
            f"parallel.tensor: {tensor} does not divide the {world_size} ranks; "
            f"{_try(sizes)}, or start a multiple of {tensor} ranks"
        )
    else:
        ranks = world_size // tensor
        whole, part = training.global_batch_size, training.micro_batch_size * ranks
        if whole % part:
            near = [n for n in (whole // part * part, (whole // part + 1) * part) if n]
            yield (
                f"training.global_batch_size: {whole} is not a multiple of micro_batch_size "
                f"{training.micro_batch_size} x {ranks} data-parallel ranks = {part}; {_try(near)}"
            )


def _deepspeed_faults(config: RunConfig, accumulation: int, precision: Precision) -> Iterator[str]:
    found = config.deepspeed.get("gradient_accumulation_steps", "auto")
    if found not in ("auto", accumulation):
        told = contradiction(found, accumulation, "training.global_batch_size")
        yield f"deepspeed.gradient_accumulation_steps: {told}"
    types = _without_auto(config.deepspeed).get("data_types", {})
    if types.get("param_dtype", precision) != precision:
        told = contradiction(types["param_dtype"], precision, "training.precision")
        yield f"deepspeed.data_types.param_dtype: {told}"
    if precision != "fp32" and zero_stage(config) == 0:
        yield (
            f"training.precision: {precision} (auto on a GPU) with ZeRO stage 0 keeps no fp32 "
            "master weights; set deepspeed.zero_optimization.stage to 1, or the precision to fp32"
        )


def _try(sizes: list[int]) -> str:
    return "try " + " or ".join(str(size) for size in sizes)


# --- memory ----------------------------------------------------------------------------------


def _bucket(config: RunConfig, plan: Plan) -> int:
    """Elements of a communication bucket: no more than there are; even, as DeepSpeed asks."""
    local = _local_elements(config, plan.tensor_parallel)
    return min(_BUCKET, local + local % 2)


def _local_elements(config: RunConfig, tensor: int, *, trained: bool = False) -> int:
    return sum(
        math.prod(shapes.local_shape(row, tensor_parallel=tensor))
        for row in shapes.parameters(config.model)
        if not trained or shapes.learns(config, row)
    )


def offloads(config: RunConfig) -> bool:
    """Whether the optimizer's states are kept on the host."""
    zero = config.deepspeed.get("zero_optimization", {})
    return bool((zero.get("offload_optimizer") or {}).get("device", "none") != "none")


def host_bytes(config: RunConfig, plan: Plan, device: Literal["cpu", "cuda"]) -> dict[str, int]:
    """Bytes that a rank keeps in its host's memory beside what `memory_bytes` totals.

    What an optimizer on the host takes, and the snapshot of a save in the background: the rank's
    share of fp32 weights and states.
    """
    n = _local_elements(config, plan.tensor_parallel)
    share = -(-(4 * n + _moments(config, plan.tensor_parallel)) // plan.data_parallel)
    return {
        "offload_optimizer": plan.memory_bytes["optimizer"]
        if device == "cuda" and offloads(config)
        else 0,
        "checkpoint.background": share if config.checkpoint.background else 0,
    }


def _memory(config: RunConfig, plan: Plan, device: Literal["cpu", "cuda"]) -> dict[str, int]:
    """Bytes of one rank at the peak of a step, in the categories of the interface.

    The total is less than the sum: gradients that a backward makes, and the buckets they are
    sent in, take the place of the activations and logits it has consumed. It is the device's: an
    optimizer that is kept on the host is not in it.
    """
    n = _local_elements(config, plan.tensor_parallel)
    element = 4 if plan.precision == "fp32" else 2
    parameters, optimizer, held, gradients = _states(config, plan, n, element)
    activations, logits = _activations(config, plan, element), _logits(config, plan, element)
    trained = _local_elements(config, plan.tensor_parallel, trained=True)
    buffers = _buffers(config, plan, trained, element)
    peak = max(held + activations + logits, gradients + buffers)
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "logits": logits,
        "buffers": buffers,
        "total": parameters + peak + (0 if device == "cuda" and offloads(config) else optimizer),
    }


def _states(config: RunConfig, plan: Plan, n: int, element: int) -> tuple[int, int, int, int]:
    """Bytes of weights, of optimizer states, and of gradients: beside activations, and at most.

    What is frozen has neither states nor gradients.

    As DeepSpeed 0.19.8 holds them, checked against its allocations: runtime/bf16_optimizer.py
    for bf16 at stage 1, else runtime/zero/stage_1_and_2.py and stage3.py. Masters are fp32,
    also of fp32 weights. A micro-batch but the first finds the gradients of those before it.
    """
    stage, d = plan.zero_stage, plan.data_parallel
    later = plan.accumulation_steps > 1
    every, n = n, _local_elements(config, plan.tensor_parallel, trained=True)
    part, parts = -(-n // d), -(-every // d)
    moments = _moments(config, plan.tensor_parallel)
    if stage == 0:
        return element * every, moments, element * n * later, element * n
    optimizer = 4 * part + -(-moments // d)
    if stage == 1 and plan.precision == "bf16":  # one flat fp32 buffer, made at the start
        return element * every, optimizer, 4 * n, 4 * n
    if stage == 1:  # each gradient in fp32; fp16's own, or the flat copy the step is made from
        extra = 4 * part if element == 4 else max(4 * part, 2 * n)
        return element * every, optimizer, 4 * n * later, 4 * n + extra
    if stage == 2:  # the partition's sum; in fp32 also the flat copy the step is made from
        return element * every, optimizer, 4 * part * later, (8 if element == 4 else 4) * part
    gathered = 0 if d == 1 else min(every, _LIVE_PARAMETERS)
    copied = 4 * min(part, _SUB_GROUP)
    return element * (parts + gathered), optimizer, 4 * part, 4 * part + copied


def _moments(config: RunConfig, tensor: int) -> int:
    """Bytes of the fp32 states that the optimizer keeps of a tensor rank's parameters."""
    local, matrices = _local_elements(config, tensor, trained=True), 0
    if config.optimizer.name == "sgd":
        return 4 * local * (config.optimizer.momentum > 0)
    if config.optimizer.name == "muon":  # one state of the blocks' matrices instead of two
        matrices = sum(
            math.prod(shapes.local_shape(row, tensor_parallel=tensor))
            for row in shapes.parameters(config.model)
            if row.is_matrix_of_block and shapes.learns(config, row)
        )
    return 8 * local - 4 * matrices


def _buffers(config: RunConfig, plan: Plan, n: int, element: int) -> int:
    """Bytes of the buckets that gradients are sent in."""
    section = _without_auto(config.deepspeed).get("zero_optimization", {})
    bucket = int(section.get("reduce_bucket_size", _bucket(config, plan)))
    if plan.zero_stage == 0:
        return element * min(n, _STAGE_0_BUCKET)
    if plan.zero_stage == 1:
        return 0 if plan.precision == "bf16" else 4 * bucket
    overlap = section.get("overlap_comm", plan.zero_stage == 3) is True
    staging = element * (2 if overlap else 1)
    return (staging + (4 if element == 2 else 0)) * bucket  # 16-bit gradients are sent in fp32


def _activations(config: RunConfig, plan: Plan, element: int) -> int:
    """Bytes kept for the backward, plus the work of the one block being differentiated."""
    model, t = config.model, plan.tensor_parallel
    tokens = plan.micro_batch_size * plan.sequence_length
    d, f = model.hidden_size, model.intermediate_size // t
    q = model.num_attention_heads * model.head_dim // t
    k = model.num_key_value_heads * model.head_dim // t
    gated = model.gated
    own = d // t if config.parallel.sequence else d  # of what is split along the tokens
    # Of a block, per token: what the norms read and give (4 D); qkv, the turned q and k, and
    # what attention gives (3 Q + 3 K); the MLP's first products, its activation and product.
    block = element * (4 * own + 3 * q + 3 * k + (4 if gated else 2) * f)
    block += 4 * q // model.head_dim  # log-sum-exp of attention
    block += 2 * own * (model.hidden_dropout > 0)  # masks, a byte an element
    kept = {
        "none": block,
        # the block's input, qkv, attention, its projection, the MLP's products
        "selective": element * (3 * own + 2 * q + 2 * k + (2 if gated else 1) * f),
        "full": element * own,
    }[config.training.activation_checkpointing]
    work = element * (2 * d + (3 if gated else 2) * f)  # gradients within the block
    if kept != block:
        work += block
    ends = element * 3 * d + 3 * 8  # embedding, last norm; ids, labels, positions
    return tokens * (sum(shapes.stacks(model).values()) * kept + work + ends)


def _logits(config: RunConfig, plan: Plan, element: int) -> int:
    """Bytes of the fused head and loss: a chunk's logits and their gradient, and the sums."""
    vocabulary = -(-config.model.vocab_size // plan.tensor_parallel)
    tokens = plan.micro_batch_size * plan.sequence_length
    chunk = 2 * 4 * min(_LOGIT_ROWS, tokens) * vocabulary
    return (
        chunk
        + 4 * vocabulary * config.model.hidden_size
        + element * tokens * (config.model.hidden_size)
    )
