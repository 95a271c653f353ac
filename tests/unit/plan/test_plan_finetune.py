# covers: megalite/plan/gradients.py
"""Fine-tuning and two stacks in a plan: what learns, what is read and written, by hand counts."""

from __future__ import annotations

from typing import Any

import pytest

from megalite import arch
from megalite.config import RunConfig, parse_config
from megalite.plan import hardware_flops_per_token, make_plan
from megalite.plan.process import process_bytes
from tests.helpers.runs import SMALL_LLAMA


def made(model: dict[str, Any], recompute: str, **sections: Any) -> RunConfig:
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


def tuned(task: str, section: dict[str, Any], recompute: str = "none", **model: Any) -> RunConfig:
    tuning = {"task": task, "data": {"path": "a", "max_length": 128}} | section
    return made(model, recompute, finetune=tuning)


def two(recompute: str = "none") -> RunConfig:
    model = {"architecture": "encoder_decoder", "num_decoder_layers": 2}
    data = {"train": [{"path": "a"}], "sequence_length": 128}
    return made(model, recompute, data=data, training={"steps": 10})


def memory(run: RunConfig) -> dict[str, int]:
    return make_plan(run, world_size=1, device="cpu").memory_bytes


def test_each_of_two_stacks_has_its_own_tokens() -> None:
    """115 tokens are read and 26 written: 19 of 128 are cut out, in 6 spans."""
    read, written = 2 * 115, 2 * 26
    own = 4 * (6 * 64 + 3 * 64 + 3 * 32 + 4 * 96) + 4 * 4  # of a block, per token
    cross = 4 * (3 * 64 + 2 * 64) + 4 * 4  # a norm, a query and what attention gives
    ends = 4 * 3 * 64 + 24
    kept = read * (3 * own + ends) + written * (2 * (own + cross) + ends) + 2 * read * 2 * 4 * 32
    work = 4 * read * (2 * 64 + 3 * 96)
    found = memory(two())
    assert found["activations"] == kept + work
    assert found["logits"] == 4 * (written * 1000 + (1000 + written) * 64)
    full = memory(two("full"))["activations"]
    assert full == 4 * 64 * (3 * read + 2 * written) + ends * (read + written) + max(
        work + read * own,
        4 * written * (2 * 64 + 3 * 96) + written * (own + cross) + read * 2 * 4 * 32,
    )


@pytest.mark.parametrize(("section", "labels"), [({}, 2), ({"class_weights": [1, 2, 3]}, 3)])
@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_a_classifier_has_no_vocabulary_to_choose_from(
    kind: str, section: dict[str, Any], labels: int
) -> None:
    """Whether its labels are told or stood in for."""
    run = tuned("classification", section, architecture=kind)
    told = tuned("classification", section, architecture=kind, num_labels=labels)
    plan, same = (make_plan(one, world_size=1, device="cpu") for one in (run, told))
    assert plan == same
    rows = arch.parameters(told.model)
    assert plan.parameters == sum(row.elements for row in rows)
    assert plan.memory_bytes["logits"] == 12 * 2 * labels
    products = sum(  # one token is written, and looks at those that are read
        row.elements * (1 if ".decoder." in row.name and ".kv_proj." not in row.name else 128)
        for row in rows
        if row.is_matrix_of_block
    )
    pairs = 3 * 128**2 + (3 * (1 + 128) if kind == "encoder_decoder" else 0)
    assert plan.flops_per_token == (6 * (products + labels * 64) + 12 * 64 * pairs) // 128


BLOCK = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96
SEEN = 4 * 64 * (128 + 1) // 2  # FLOPs of attention's forward, per token and block
LOW = 8 * ((3 * 64 + 128) + (64 + 64) + (2 * 64 + 192) + (96 + 64))  # adapters of a block
HEAD = 1000 * 64


@pytest.mark.parametrize(
    ("section", "blocks", "expected"),
    [
        ({}, 3, 6 * (3 * BLOCK + HEAD) + 9 * SEEN),
        # what is frozen passes gradients on, but for the projection of the first block
        (
            {"adapter": {"rank": 8}},
            3,
            4 * (3 * BLOCK + HEAD) - 2 * 64 * 128 + 6 * 3 * LOW - 2 * 8 * 3 * 64 + 9 * SEEN,
        ),
        # of the second block's input there is none, but of its first norm's gain
        (
            {"freeze": ["model.embed_*", "model.layers.0.*"]},
            2,
            2 * BLOCK + 6 * (2 * BLOCK + HEAD) + 7 * SEEN,
        ),
        ({"freeze": ["model.*"]}, 0, 2 * 3 * BLOCK + 4 * HEAD + 3 * SEEN),
    ],
)
def test_flops_of_what_learns(section: dict[str, Any], blocks: int, expected: int) -> None:
    run = tuned("language_modeling", section)
    assert make_plan(run, world_size=1, device="cpu").flops_per_token == expected
    whole = tuned("language_modeling", section, recompute="full")
    again = blocks * (2 * (BLOCK + LOW * ("adapter" in section)) + SEEN)
    assert hardware_flops_per_token(whole) == expected + again


def test_a_frozen_head_has_no_gradient_in_memory() -> None:
    learned, frozen = (
        memory(tuned("sft", section))["logits"] for section in ({}, {"freeze": ["lm_head.*"]})
    )
    assert learned - frozen == 4 * 1000 * 64


def test_a_process_holds_its_frozen_weights() -> None:
    tuning = {"task": "language_modeling", "data": {"path": "a", "max_length": 128}}
    tuning["freeze"] = ["model.layers.*"]
    run = made({}, "none", finetune=tuning, deepspeed={"zero_optimization": {"stage": 0}})
    plan = make_plan(run, world_size=1, device="cpu")
    told = plan.memory_bytes
    assert told["parameters"] > told["gradients"]
    assert told["total"] >= told["parameters"] + told["optimizer"] + told["activations"]
    taken = process_bytes(run, plan)
    work = 4 * 256 * (2 * 64 + 3 * 96)
    holes = round(0.55 * told["activations"])
    assert taken == (85 << 20) + told["total"] - work + holes + told["gradients"]
