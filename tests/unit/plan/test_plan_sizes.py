# covers: megalite/plan/sizes.py megalite/plan/engine.py megalite/plan/memory.py
# covers: megalite/plan/flops.py megalite/plan/zero.py megalite/plan/optimizer.py
"""Batch arithmetic, FLOPs and bytes, compared with hand counts; DeepSpeed's JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megalite.arch.attention import seen_pairs
from megalite.config import RunConfig, parse_config
from megalite.errors import ConfigError
from megalite.plan import deepspeed_dict, flops_per_token, hardware_flops_per_token, make_plan
from megalite.plan.process import process_bytes
from tests.helpers.runs import SMALL_LLAMA

WEIGHTS = 1000 * 64 * 2 + 3 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96)
PARAMETERS = WEIGHTS + 7 * 64  # two norms per block, and the final norm


def config(**changes: Any) -> RunConfig:
    """Return a small Llama, changed by `section__key=value`."""
    raw: dict[str, Any] = {
        "name": "run",
        "model": dict(SMALL_LLAMA),
        "data": {"train": [{"path": "a"}], "sequence_length": 128},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = raw
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return parse_config(raw)


def stage(number: int) -> dict[str, Any]:
    return {"deepspeed__zero_optimization": {"stage": number}}


def faults(run: RunConfig, world_size: int, device: Any = "cpu") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_plan(run, world_size=world_size, device=device)
    return caught.value.faults


# --- sizes -----------------------------------------------------------------------------------


def test_plan_divides_the_batch_over_ranks_and_steps() -> None:
    plan = make_plan(config(parallel__tensor=2), world_size=4, device="cpu")
    assert (plan.tensor_parallel, plan.data_parallel, plan.accumulation_steps) == (2, 2, 2)
    assert (plan.global_batch_size, plan.micro_batch_size) == (8, 2)
    assert plan.tokens_per_step == 8 * 128
    assert plan.parameters == PARAMETERS
    assert plan.zero_stage == 1


def test_auto_precision_follows_the_device() -> None:
    assert make_plan(config(), world_size=1, device="cpu").precision == "fp32"
    assert make_plan(config(), world_size=1, device="cuda").precision == "bf16"
    fixed = config(training__precision="fp16")
    assert make_plan(fixed, world_size=1, device="cpu").precision == "fp16"


@pytest.mark.parametrize(
    ("changes", "world_size", "device", "expected"),
    [
        (
            {},
            3,
            "cpu",
            "training.global_batch_size: 8 is not a multiple of micro_batch_size 2 x 3 "
            "data-parallel ranks = 6; try 6 or 12",
        ),
        (
            {"training__micro_batch_size": 8},
            2,
            "cpu",
            "training.global_batch_size: 8 is not a multiple of micro_batch_size 8 x 2 "
            "data-parallel ranks = 16; set training.micro_batch_size to 4, which changes no "
            "result; or for the global batch try 16",
        ),
        (
            {},
            16,
            "cpu",
            "training.global_batch_size: 8 is not a multiple of micro_batch_size 2 x 16 "
            "data-parallel ranks = 32; try 32",
        ),
        (
            {"parallel__tensor": 2},
            3,
            "cpu",
            "parallel.tensor: 2 does not divide the 3 ranks; try 1, or start a multiple of 2 ranks",
        ),
        (
            stage(0),
            1,
            "cuda",
            "training.precision: bf16 (auto on GPUs) with ZeRO stage 0 keeps no fp32 master "
            "weights; set deepspeed.zero_optimization.stage to 1, or the precision to fp32",
        ),
        (
            {"deepspeed__gradient_accumulation_steps": 3},
            1,
            "cpu",
            "deepspeed.gradient_accumulation_steps: got 3, but training.global_batch_size sets it "
            "to 4; change training.global_batch_size, and remove this key",
        ),
        (
            {"deepspeed__data_types": {"param_dtype": "bf16"}},
            1,
            "cpu",
            'deepspeed.data_types.param_dtype: got "bf16", but training.precision sets it to '
            '"fp32"; change training.precision, and remove this key',
        ),
        *(
            (
                {f"deepspeed__zero_optimization__{key}": {"device": device}},
                1,
                "cuda",
                f"deepspeed.zero_optimization.{key}: device {device} is not supported; remove it, "
                "and offload the optimizer to cpu or use more ranks",
            )
            for key, device in (("offload_param", "cpu"), ("offload_optimizer", "nvme"))
        ),
    ],
)
def test_impossible_layouts_are_refused_with_advice(
    changes: dict[str, Any], world_size: int, device: Any, expected: str
) -> None:
    assert faults(config(**changes), world_size, device) == [expected]


def test_flops_count_the_head_and_causal_attention() -> None:
    matrices = WEIGHTS - 1000 * 64  # the embedding is not multiplied
    expected = 6 * matrices + 12 * 3 * 64 * (128 + 1) // 2
    assert flops_per_token(config().model, 128) == expected
    tied = config(model__tie_word_embeddings=True).model
    assert flops_per_token(tied, 128) == expected
    assert flops_per_token(config(model__attention_bias=True).model, 128) == expected


# --- memory ----------------------------------------------------------------------------------


def memory(world_size: int = 1, device: Any = "cpu", **changes: Any) -> dict[str, int]:
    return make_plan(config(**changes), world_size=world_size, device=device).memory_bytes


def test_one_rank_holds_all_states() -> None:
    n = PARAMETERS
    plain = memory(**stage(0))
    assert (plain["parameters"], plain["gradients"], plain["optimizer"]) == (4 * n, 4 * n, 8 * n)
    zero = memory(**stage(1))
    assert (zero["parameters"], zero["optimizer"]) == (4 * n, 12 * n)  # with fp32 master weights
    half = memory(device="cuda", **stage(1))
    assert (half["parameters"], half["gradients"], half["optimizer"]) == (2 * n, 4 * n, 12 * n)
    momentum = memory(optimizer__name="sgd", **stage(1))
    assert momentum["optimizer"] == 8 * n
    assert memory(optimizer__name="sgd", optimizer__momentum=0, **stage(1))["optimizer"] == 4 * n


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_zero_stages_divide_states_over_ranks(device: str) -> None:
    n, element = PARAMETERS, 4 if device == "cpu" else 2
    part = n // 4
    one, two, three = (memory(4, device, **stage(number)) for number in (1, 2, 3))
    assert one["optimizer"] == two["optimizer"] == three["optimizer"] == 12 * part
    assert one["parameters"] == two["parameters"] == element * n
    assert three["parameters"] == element * (part + n)  # all of a small model stays gathered
    assert two["gradients"] == (8 if device == "cpu" else 4) * part
    assert one["gradients"] >= 4 * n


def test_tensor_parallelism_divides_split_weights() -> None:
    whole, half = memory(2), memory(2, parallel__tensor=2)
    norms = 4 * 7 * 64
    assert half["parameters"] == (whole["parameters"] - norms) // 2 + norms
    assert half["activations"] < whole["activations"]
    assert half["logits"] < whole["logits"]


def test_recomputation_modes_save_increasingly() -> None:
    deep = {"model__num_hidden_layers": 40}
    none, selective, full = (
        memory(training__activation_checkpointing=mode, **deep)["activations"]
        for mode in ("none", "selective", "full")
    )
    assert full < selective / 2
    assert selective < none * 0.7
    tokens = 2 * 128
    assert none - memory()["activations"] == 37 * tokens * (
        4 * (6 * 64 + 3 * 64 + 3 * 32 + 4 * 96) + 4 * 4  # per token and block
    )


def test_total_is_the_larger_of_two_moments() -> None:
    bytes_ = memory(**stage(1))  # 4 micro-batches: gradients and their bucket stay
    assert bytes_["total"] == (
        bytes_["parameters"]
        + bytes_["optimizer"]
        + 4 * PARAMETERS
        + bytes_["buffers"]
        + bytes_["activations"]
        + bytes_["logits"]
    )
    once = memory(training__micro_batch_size=8, **stage(1))
    assert once["total"] == sum(once.values()) - once["total"] - once["gradients"] - once["buffers"]
    assert once["total"] >= once["parameters"] + once["optimizer"] + once["gradients"]


def test_logits_cover_only_predicted_positions() -> None:
    every = memory()["logits"]
    hidden = memory(
        model__architecture="encoder",
        objective={"name": "masked", "mask_token_id": 0, "mask_probability": 0.1},
    )["logits"]
    assert every == 4 * (256 * 1000 + (1000 + 256) * 64)  # 2 x 128 positions, 1,000 ids
    assert hidden == 4 * (64 * 1000 + (1000 + 64) * 64)  # 26 of them, rounded up


def test_zero_3_adds_a_resident_bucket_and_prefetch_buffers() -> None:
    n, stage_2 = PARAMETERS, memory(2, **stage(2))
    whole = memory(2, **stage(3))
    part = n // 2
    work = 4 * 256 * (2 * 64 + 3 * 96)  # gradients within a block, freed before the last gather
    before = whole["activations"] - work + max(work + whole["logits"], 4 * n)
    assert whole["buffers"] == stage_2["buffers"] + 4 * n + 4 * n  # overlap_comm; prefetch
    assert whole["total"] - whole["parameters"] - whole["optimizer"] == max(
        before + 4 * part + 4 * n, whole["gradients"] + 8 * n
    )


def test_process_memory_adds_libraries_and_fragmentation() -> None:
    run = config(**stage(0))
    alone, pair = (make_plan(run, world_size=ranks, device="cpu") for ranks in (1, 2))
    bytes_ = alone.memory_bytes
    process = process_bytes(run, alone)
    work = 4 * 256 * (2 * 64 + 3 * 96)  # gradients within a block reuse the memory of the logits
    fragmentation = round(0.55 * bytes_["activations"])
    assert process == (85 << 20) + bytes_["total"] - work + fragmentation + bytes_["gradients"]
    grown = pair.memory_bytes["total"] - bytes_["total"]
    assert process_bytes(run, pair) - process == (40 << 20) + grown


# --- DeepSpeed's JSON ------------------------------------------------------------------------


def section(world_size: int = 1, device: Any = "cpu", **changes: Any) -> dict[str, Any]:
    run = config(**changes)
    before = json.dumps(run.deepspeed)
    result = deepspeed_dict(run, make_plan(run, world_size=world_size, device=device))
    assert json.dumps(run.deepspeed) == before  # the config is unchanged
    assert '"auto"' not in json.dumps(result)
    return result


def test_deepspeed_json_contains_the_owned_values() -> None:
    result = section(2)
    assert result["train_batch_size"] == 8
    assert result["train_micro_batch_size_per_gpu"] == 2
    assert result["gradient_accumulation_steps"] == 2
    assert result["gradient_clipping"] == 1.0
    assert result["gradient_allreduce_op"] == "sum"
    assert result["data_types"] == {"grad_accum_dtype": "fp32"}
    assert (result["bf16"]["enabled"], result["fp16"]["enabled"]) == (False, False)
    assert result["zero_optimization"]["stage"] == 1
    assert result["zero_allow_untested_optimizer"] is False
    assert "optimizer" not in result
    assert "scheduler" not in result


def test_stage_0_leaves_clipping_to_megalite() -> None:
    result = section(**stage(0))
    assert result["gradient_clipping"] == 0.0
    assert result["zero_optimization"] == {"stage": 0, "compute_grad_norm": True}


def test_stage_3_averages_gradients() -> None:
    result = section(2, "cuda", **stage(3))
    assert result["gradient_allreduce_op"] == "mean"
    assert result["zero_optimization"]["overlap_comm"] is True
    assert result["bf16"]["enabled"] is True
    assert result["bf16"]["check_grad_overflow"] is True


def test_sgd_counts_as_an_untested_optimizer() -> None:
    assert section(optimizer__name="sgd")["zero_allow_untested_optimizer"] is True


def test_user_values_stay_and_auto_is_filled_in() -> None:
    result = section(
        deepspeed={
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "fp16": {"enabled": "auto", "initial_scale_power": 10},
            "bf16": "auto",
            "steps_per_print": 5,
            "log_level": "info",
            "optimizer": "auto",
            "zero_optimization": {
                "stage": 2,
                "overlap_comm": True,
                "reduce_bucket_size": 1000,
                "allgather_bucket_size": "auto",
                "stage3_max_live_parameters": "auto",
                "offload_optimizer": {"device": "none"},
            },
        }
    )
    assert result["train_batch_size"] == 8
    assert result["steps_per_print"] == 5
    assert result["fp16"]["initial_scale_power"] == 10
    zero = result["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (2, True, 1000)
    assert zero["allgather_bucket_size"] == PARAMETERS  # not the bucket of gradients
    assert zero["offload_optimizer"] == {"device": "none"}
    assert "stage3_max_live_parameters" not in zero
    assert "optimizer" not in result


def test_buckets_are_no_larger_than_the_model() -> None:
    zero = section()["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == PARAMETERS
    odd = section(model__vocab_size=1001, model__hidden_size=1, model__head_dim=2)
    assert odd["zero_optimization"]["allgather_bucket_size"] % 2 == 0
    large = section(model__vocab_size=2_000_000)["zero_optimization"]
    assert large["reduce_bucket_size"] == 50_000_000


def test_sequence_parallelism_saves_activations() -> None:
    """Two norms save 3 D each, and a rank only its own tokens: 6 D of 2 x 128 tokens."""
    plans = [
        make_plan(
            config(parallel__tensor=2, parallel__sequence=sequence), world_size=2, device="cpu"
        )
        for sequence in (False, True)
    ]
    plain, split = (plan.memory_bytes["activations"] for plan in plans)
    assert plain - split == 3 * 4 * (6 * 32) * 256


def test_offloaded_optimizer_takes_no_gpu_memory() -> None:
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    layernorm = {"model__norm": "layernorm", "training__precision": "bf16"}
    run = config(deepspeed__zero_optimization=offload, **layernorm)
    on_cpu = make_plan(run, world_size=2, device="cpu").memory_bytes
    on_gpu = make_plan(run, world_size=2, device="cuda").memory_bytes
    n = PARAMETERS + 7 * 64  # with the biases of the norms
    assert on_cpu["optimizer"] == on_gpu["optimizer"] == -(-n // 2) * 12
    assert on_cpu["total"] - on_gpu["total"] == on_cpu["optimizer"]


def test_muon_keeps_one_state_per_block_matrix() -> None:
    run = config(optimizer__name="muon", **stage(1))
    matrices = WEIGHTS - 2 * 1000 * 64
    expected = 12 * PARAMETERS - 4 * matrices
    assert make_plan(run, world_size=1, device="cpu").memory_bytes["optimizer"] == expected


# --- FLOPs of attention -----------------------------------------------------------------------


def _counted(tokens: int, causal: bool, window: int | None, document: int | None) -> int:
    """Count the pairs of a window one by one."""
    near, count = window or tokens, 0
    for query in range(tokens):
        for key in range(tokens):
            same = document is None or query // document == key // document
            count += same and abs(query - key) < near and (key <= query or not causal)
    return count


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 24, 99])
@pytest.mark.parametrize("document", [None, 4, 24, 48])
def test_seen_pairs_match_a_direct_count(
    causal: bool, window: int | None, document: int | None
) -> None:
    pairs = seen_pairs(24, document, causal=causal, window=window)
    assert pairs == _counted(24, causal, window, document)


def test_full_recompute_repeats_only_the_blocks() -> None:
    model = flops_per_token(config().model, 128)
    flops = {
        mode: hardware_flops_per_token(config(training__activation_checkpointing=mode))
        for mode in ("none", "selective", "full")
    }
    assert flops["none"] == flops["selective"] == model
    head = 6 * 1000 * 64
    assert flops["full"] == pytest.approx(model + (model - head) / 3)
