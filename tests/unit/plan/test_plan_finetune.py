# covers: megalite/plan/gradients.py
"""Plans of fine-tuning and encoder-decoders, compared with hand counts."""

from __future__ import annotations

from typing import Any

import pytest

from megalite import arch
from megalite.config import RunConfig, parse_config
from megalite.plan import hardware_flops_per_token, make_plan
from megalite.plan.process import process_bytes
from tests.helpers.runs import SMALL_LLAMA


def build_config(model: dict[str, Any], recompute: str, **sections: Any) -> RunConfig:
    training = {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "activation_checkpointing": recompute,
    }
    raw = {
        "name": "run",
        "model": SMALL_LLAMA | model,
        "optimizer": {"lr": 1e-3},
        "training": training,
    }
    raw["training"] |= sections.pop("training", {})
    return parse_config(raw | sections)


def finetune_config(
    task: str, section: dict[str, Any], recompute: str = "none", **model: Any
) -> RunConfig:
    tuning = {"task": task, "data": {"path": "a", "max_length": 128}} | section
    return build_config(model, recompute, finetune=tuning)


def encoder_decoder(recompute: str = "none") -> RunConfig:
    model = {"architecture": "encoder_decoder", "num_decoder_layers": 2}
    data = {"train": [{"path": "a"}], "sequence_length": 128}
    return build_config(model, recompute, data=data, training={"steps": 10})


def memory(run: RunConfig) -> dict[str, int]:
    return make_plan(run, world_size=1, device="cpu").memory_bytes


def test_encoder_and_decoder_have_their_own_tokens() -> None:
    """The encoder reads 115 tokens, the decoder writes 26: 19 of 128 are cut out, in 6 spans."""
    read, written = 2 * 115, 2 * 26
    self_attention = 4 * (6 * 64 + 3 * 64 + 3 * 32 + 4 * 96) + 4 * 4  # per token and block
    cross_attention = 4 * (3 * 64 + 2 * 64) + 4 * 4  # a norm, a query and attention's output
    ends = 4 * 3 * 64 + 24
    saved = (
        read * (3 * self_attention + ends)
        + written * (2 * (self_attention + cross_attention) + ends)
        + 2 * read * 2 * 4 * 32
    )
    work = 4 * read * (2 * 64 + 3 * 96)
    planned = memory(encoder_decoder())
    assert planned["activations"] == saved + work
    assert planned["logits"] == 4 * (written * 1000 + (1000 + written) * 64)
    full = memory(encoder_decoder("full"))["activations"]
    assert full == 4 * 64 * (3 * read + 2 * written) + ends * (read + written) + max(
        work + read * self_attention,
        4 * written * (2 * 64 + 3 * 96)
        + written * (self_attention + cross_attention)
        + read * 2 * 4 * 32,
    )


@pytest.mark.parametrize(("section", "labels"), [({}, 2), ({"class_weights": [1, 2, 3]}, 3)])
@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_classifier_plans_ignore_the_vocabulary(
    kind: str, section: dict[str, Any], labels: int
) -> None:
    """The plan is the same with given and with placeholder labels."""
    run = finetune_config("classification", section, architecture=kind)
    explicit = finetune_config("classification", section, architecture=kind, num_labels=labels)
    plan, same = (make_plan(one, world_size=1, device="cpu") for one in (run, explicit))
    assert plan == same
    rows = arch.parameters(explicit.model)
    assert plan.parameters == sum(row.elements for row in rows)
    assert plan.memory_bytes["logits"] == 12 * 2 * labels
    products = sum(  # the decoder writes one token, which attends to all that are read
        row.elements * (1 if ".decoder." in row.name and ".kv_proj." not in row.name else 128)
        for row in rows
        if row.is_matrix_of_block
    )
    pairs = 3 * 128**2 + (3 * (1 + 128) if kind == "encoder_decoder" else 0)
    assert plan.flops_per_token == (6 * (products + labels * 64) + 12 * 64 * pairs) // 128


BLOCK = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96
ATTENTION = 4 * 64 * (128 + 1) // 2  # FLOPs of attention's forward, per token and block
ADAPTERS = 8 * ((3 * 64 + 128) + (64 + 64) + (2 * 64 + 192) + (96 + 64))  # adapters of a block
HEAD = 1000 * 64


@pytest.mark.parametrize(
    ("section", "blocks", "expected"),
    [
        ({}, 3, 6 * (3 * BLOCK + HEAD) + 9 * ATTENTION),
        # frozen weights pass gradients on, except for the projection of the first block
        (
            {"adapter": {"rank": 8}},
            3,
            4 * (3 * BLOCK + HEAD)
            - 2 * 64 * 128
            + 6 * 3 * ADAPTERS
            - 2 * 8 * 3 * 64
            + 9 * ATTENTION,
        ),
        # the second block's input has no gradient, but its first norm's gain has one
        (
            {"freeze": ["model.embed_*", "model.layers.0.*"]},
            2,
            2 * BLOCK + 6 * (2 * BLOCK + HEAD) + 7 * ATTENTION,
        ),
        ({"freeze": ["model.*"]}, 0, 2 * 3 * BLOCK + 4 * HEAD + 3 * ATTENTION),
    ],
)
def test_flops_count_only_the_gradients_that_exist(
    section: dict[str, Any], blocks: int, expected: int
) -> None:
    run = finetune_config("language_modeling", section)
    assert make_plan(run, world_size=1, device="cpu").flops_per_token == expected
    whole = finetune_config("language_modeling", section, recompute="full")
    recomputed = blocks * (2 * (BLOCK + ADAPTERS * ("adapter" in section)) + ATTENTION)
    assert hardware_flops_per_token(whole) == expected + recomputed


def test_frozen_head_needs_no_gradient_memory() -> None:
    trained, frozen = (
        memory(finetune_config("sft", section))["logits"]
        for section in ({}, {"freeze": ["lm_head.*"]})
    )
    assert trained - frozen == 4 * 1000 * 64


def test_process_memory_includes_frozen_weights() -> None:
    tuning = {"task": "language_modeling", "data": {"path": "a", "max_length": 128}}
    tuning["freeze"] = ["model.layers.*"]
    run = build_config({}, "none", finetune=tuning, deepspeed={"zero_optimization": {"stage": 0}})
    plan = make_plan(run, world_size=1, device="cpu")
    explicit = plan.memory_bytes
    assert explicit["parameters"] > explicit["gradients"]
    assert (
        explicit["total"]
        >= explicit["parameters"] + explicit["optimizer"] + explicit["activations"]
    )
    process = process_bytes(run, plan)
    work = 4 * 256 * (2 * 64 + 3 * 96)
    fragmentation = round(0.55 * explicit["activations"])
    assert process == (85 << 20) + explicit["total"] - work + fragmentation + explicit["gradients"]
