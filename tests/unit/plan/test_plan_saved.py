# covers: megalite/arch/products.py megalite/plan/activations.py megalite/plan/costs.py
# covers: megalite/plan/workloads.py megalite/plan/process.py
"""Planned activation memory, compared with what a forward on a CPU saves for its backward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import RunConfig, parse_config
from megalite.engine.base import freeze
from megalite.model import build, initialize, make_objective
from megalite.plan import make_plan, resolve_labels
from megalite.plan.activations import activation_bytes

T, B, VOCABULARY = 192, 3, 500
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": T,
}
BERT: dict[str, Any] = {
    "architecture": "encoder",
    "num_key_value_heads": 6,
    "norm": "layernorm",
    "norm_position": "post",
    "activation": "gelu",
    "position_embedding": "learned",
    "hidden_dropout": 0.1,
}
LABELS = {"task": "classification", "data": {"path": "a", "max_length": T}}
CHAT = {"task": "sft", "data": {"path": "a", "max_length": T}}
KINDS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "documents": {"data": {"mask_documents": True}},
    "window": {"model": {"sliding_window": 50}},
    "mixed windows": {
        "model": {"sliding_window": 50, "layer_types": ["sliding_attention", "full_attention"]}
    },
    "packed": {"finetune": CHAT | {"data": CHAT["data"] | {"packing": True}}},
    "adapters": {"finetune": CHAT | {"adapter": {"rank": 4}}},
    "padded encoder": {"model": {"architecture": "encoder"}, "finetune": LABELS},
    "dropout": {"model": BERT, "finetune": LABELS},
    "attention dropout": {"model": BERT | {"attention_dropout": 0.1}, "finetune": LABELS},
    "relative positions": {"model": {"position_embedding": "relative"}},
}


def run_of(kind: str, precision: str) -> RunConfig:
    sections = KINDS[kind]
    raw: dict[str, Any] = {
        "name": "run",
        "model": MODEL | sections.get("model", {}),
        "optimizer": {"lr": 1e-3},
        "training": {"global_batch_size": B, "micro_batch_size": B, "precision": precision},
    }
    if tuning := sections.get("finetune"):
        raw["finetune"] = tuning
    else:
        raw["data"] = {"train": [{"path": "a"}], "sequence_length": T} | sections.get("data", {})
        raw["training"]["steps"] = 1
    return resolve_labels(parse_config(raw))


def batch_of(run: RunConfig) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (B, T))
    if run.model.num_labels:
        ones = torch.ones(B, dtype=torch.bool)
        batch = {"labels": torch.zeros(B, dtype=torch.int64), "loss_mask": ones}
        batch |= {"lengths": torch.full((B,), T)}
        batch |= {"attention_mask": torch.ones(B, T, dtype=torch.bool)}
        return batch | {"input_ids": ids}
    batch = {"input_ids": ids, "labels": ids, "loss_mask": torch.ones(B, T, dtype=torch.bool)}
    if run.data.mask_documents or (run.finetune and run.finetune.data.packing):
        places = torch.arange(T).expand(B, T)
        batch |= {"document_ids": places // 40, "position_ids": places % 40}
    return batch


def saved_bytes(run: RunConfig, dtype: torch.dtype) -> int:
    """Return the bytes that a forward saves, without parameters and the fused loss's gradients."""
    model = build(run.model)
    initialize(model, run.model, seed=0, gather=lambda _: nullcontext())
    model.to(dtype).train()
    freeze(model, run)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def record(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            saved[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = model(make_objective(run).loss, batch_of(run)).total
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("kind", KINDS)
def test_planned_activations_match_those_that_a_forward_saves(kind: str) -> None:
    run = run_of(kind, "fp32")
    plan = make_plan(run, world_size=1, device="cpu")
    saved, _ = activation_bytes(run, plan, "cpu")
    assert saved == pytest.approx(saved_bytes(run, torch.float32), rel=0.04)


@pytest.mark.parametrize("kind", ["decoder", "documents", "adapters", "dropout"])
def test_planned_bf16_activations_match_those_of_a_forward_on_a_cpu(kind: str) -> None:
    """The CPU's norm saves fp32 copies."""
    run = run_of(kind, "bf16")
    plan = make_plan(run, world_size=1, device="cpu")
    saved, _ = activation_bytes(run, plan, "cpu")
    assert saved == pytest.approx(saved_bytes(run, torch.bfloat16), rel=0.04)


def test_masks_on_a_gpu_repeat_shared_heads() -> None:
    """Each layer adds a bf16 mask and 2 x 4 heads of 16; all layers share one bool mask."""
    plain, masked = run_of("decoder", "bf16"), run_of("documents", "bf16")
    plans = [make_plan(run, world_size=1, device="cuda") for run in (plain, masked)]
    before, after = (plan.memory_bytes["activations"] for plan in plans)
    assert after - before == B * T * T + 4 * 2 * (B * T * T + 2 * 4 * 16 * B * T)
