# covers: megalite/parity/dry_run.py
"""The dry run of a step in a fake world: its counts equal the plan's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megalite.config import RunConfig, load_config, parse_config
from megalite.parity.dry_run import dry_run
from megalite.plan import make_plan, resolve_labels, tensor_collectives
from megalite.plan.zero import local_elements
from tests.helpers.runs import BASE

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
# run files without a model section, because they start from another model
WITHOUT_A_MODEL = ("finetune/sft", "finetune/lora", "finetune/chat", "finetune/table_pretrained")
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.json") if path.stem != "schema")
TUNING = sorted(f"finetune/{path.stem}" for path in CONFIGS.glob("finetune/*.json"))
MODEL = {
    "vocab_size": 1001,  # divided by no number of ranks
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
TWO = {"architecture": "encoder_decoder", "num_decoder_layers": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"norm": "layernorm", "activation": "gelu", "position_embedding": "learned", **BIASES},
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True},
    "bert": {"architecture": "encoder", "norm_position": "post", "norm": "layernorm", **BIASES},
    "t5": {**TWO, "position_embedding": "relative"},
    "transformer": {**TWO, "norm_position": "post", "hidden_dropout": 0.1},
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "windows": {"sliding_window": 8, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
}


def config(kind: str, **sections: Any) -> RunConfig:
    model = MODEL | KINDS[kind]
    length = 35 if "num_decoder_layers" in model else 144  # four ranks can share both stacks
    objective = {"encoder": {"name": "masked", "mask_token_id": 1000}}
    raw = dict(BASE) | {
        "model": model,
        "data": {"train": [{"path": "a"}], "sequence_length": length},
        "objective": objective.get(model.get("architecture", ""), {}),
        "training": {"steps": 1, "global_batch_size": 256, "micro_batch_size": 2},
    }
    for key, value in sections.items():
        raw[key] = {**raw.get(key, {}), **value}
    return parse_config(raw)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dry_run_counts_the_collectives_of_the_plan(
    kind: str, sequence: bool, recompute: str
) -> None:
    run = config(
        kind,
        parallel={"tensor": 4, "sequence": sequence},
        training={"activation_checkpointing": recompute},
    )
    plan = make_plan(run, world_size=64, device="cuda")
    assert plan.accumulation_steps == 8
    result = dry_run(run, plan)
    assert result.differences == ()
    assert result.parameters == result.with_gradient
    assert all(call.count % 8 == 0 for call in result.collectives)
    assert not dist.is_initialized()


def test_dry_run_of_a_compiled_run_does_not_compile() -> None:
    run = config("llama", parallel={"tensor": 2}, training={"compile": True})
    assert dry_run(run, make_plan(run, world_size=4, device="cuda")).differences == ()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [*((name, 0) for name in SHIPPED), *((name, size) for name in TUNING for size in (1, 2))],
)
def test_dry_run_of_shipped_configs_agrees_with_the_plan(name: str, tensor: int) -> None:
    """If `tensor` is not 0, it is the tensor-parallel size."""
    filled_in = {"num_labels", "classifier_pooling", "adapter"}
    base = load_config(CONFIGS / "125m.json").model.model_dump(mode="json", exclude=filled_in)
    sets = [f"parallel.tensor={tensor}"] if tensor else []
    model = base if name in WITHOUT_A_MODEL else None
    run = load_config(CONFIGS / f"{name}.json", sets, model=model)
    world = run.parallel.tensor * run.training.global_batch_size // run.training.micro_batch_size
    result = dry_run(run, make_plan(run, world_size=world, device="cuda"))
    assert result.differences == ()


def tuned(kind: str, task: str, section: dict[str, Any], **sections: Any) -> RunConfig:
    """Return `config(...)` with a finetune section."""
    raw = config(kind, **sections).model_dump(mode="json")
    raw["data"]["train"], raw["training"]["steps"] = [], 0
    raw["data"]["sequence_length"] += raw["data"]["sequence_length"] % 2  # 36: a multiple of 4
    del raw["model"]["adapter"]  # it follows from the finetune section
    data = {"path": "a.csv", "max_length": raw["data"]["sequence_length"], "max_target_length": 36}
    section = section | {"task": task, "data": data | section.get("data", {})}
    return parse_config({k: v for k, v in raw.items() if k != "objective"} | {"finetune": section})


LORA = {"adapter": {"rank": 4}}
FEW = {"adapter": {"rank": 4, "dropout": 0.1, "targets": ["v_proj", "up_proj", "o_proj"]}}
FIRST = {"freeze": ["model.embed_*", "model.layers.[01].*"]}
NORMS = {"freeze": ["*_proj.*", "*embed_*", "lm_head.*", "lm_transform.*", "score.*"]}
READER = {"freeze": ["model.embed_*", "model.encoder.*", "*.layers.0.self_attn.*"]}
WRITER = {"freeze": ["model.embed_*", "model.decoder.*"]}
SCORE = {"freeze": ["model.*"]}
_TASKS = (
    *(("llama", "sft", section) for section in (LORA, FEW, FIRST, NORMS)),
    ("qwen3", "sft", LORA),
    ("qwen3", "sft", {**FIRST, "label_smoothing": 0.1}),
    ("dropout", "classification", LORA),
    *(("gpt2", "classification", section) for section in ({}, FEW, FIRST, SCORE)),
    *(("bert", "classification", section) for section in ({}, LORA, FIRST, NORMS)),
    ("bert", "classification", {"data": {"labels": ["a", "b", "c"]}, "class_weights": [1, 2, 3]}),
    *(("t5", "seq2seq", section) for section in ({}, LORA, FEW, READER, WRITER)),
    *(("transformer", "seq2seq", section) for section in (LORA, READER, NORMS)),
    *(("transformer", "classification", section) for section in ({}, LORA, WRITER)),
)
TASKS = [
    (*task, sequence)
    for task in _TASKS
    for sequence in (False, True)
    if not (sequence and task[:2] == ("transformer", "classification"))  # its decoder has one token
]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("kind", "task", "section", "sequence"), TASKS)
def test_dry_run_of_frozen_parameters_counts_the_collectives_of_the_plan(
    kind: str, task: str, section: dict[str, Any], sequence: bool, recompute: str
) -> None:
    """The cases are classifiers, adapters, and freezing of layers of any kind."""
    run = tuned(
        kind,
        task,
        section,
        parallel={"tensor": 4, "sequence": sequence},
        training={"activation_checkpointing": recompute},
    )
    plan = make_plan(run, world_size=64, device="cuda")
    result = dry_run(run, plan)
    assert result.differences == ()
    assert 0 < result.with_gradient <= result.parameters
    assert result.with_gradient == local_elements(resolve_labels(run), 4, trained=True)


def test_dry_run_of_a_thousand_ranks_agrees_with_the_plan() -> None:
    sets = ["parallel.tensor=8", "training.micro_batch_size=1", "model.num_hidden_layers=4"]
    run = load_config(CONFIGS / "70b.json", sets)
    plan = make_plan(run, world_size=1024, device="cuda")
    result = dry_run(run, plan)
    assert result.differences == ()
    assert sum(call.bytes for call in result.collectives) > 0


def test_dry_run_reports_differences_from_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config("llama", parallel={"tensor": 2})
    plan = make_plan(run, world_size=2, device="cuda")
    expected = tensor_collectives(run, plan)
    wrong = replace(expected[0], count=expected[0].count + 1)
    monkeypatch.setattr(
        "megalite.parity.dry_run.tensor_collectives", lambda *_: (wrong, *expected[1:])
    )
    monkeypatch.setattr("megalite.parity.dry_run.local_elements", lambda *_: 17)
    parameters, planned, counted = dry_run(run, plan).differences
    assert parameters.startswith("parameters of a rank: 17 planned, ")
    assert planned == f"planned, but not counted: {wrong}"
    assert counted == f"counted, but not planned: {expected[0]}"
