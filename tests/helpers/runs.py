"""Small runs for tests: run files, training in this process, and the recorded rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from megalite.config import parse_config
from megalite.env import Launch

# under ZeRO-3, release even small weights between uses
RELEASED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 1000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}

# A minimal run file.
BASE: dict[str, Any] = {
    "name": "run",
    "model": {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "data": {"train": [{"path": "a"}], "sequence_length": 64},
    "optimizer": {"lr": 1e-3},
    "training": {"steps": 100, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
}
# Sizes for tests that count parameters by hand.
SMALL_LLAMA: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def merge_sections(base: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a run file, with the keys of each section replaced or added."""
    raw = deepcopy(dict(base))
    for name, value in sections.items():
        raw[name] = raw.get(name, {}) | value if isinstance(value, dict) else value
    return raw


# A run that learns bytes in seconds.
_TRAINED = merge_sections(
    BASE,
    {
        "model": {
            "vocab_size": 301,
            "hidden_size": 48,
            "intermediate_size": 112,
            "num_key_value_heads": 2,
        },
        "data": {"sequence_length": 32},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 5},
        "training": {"steps": 20, "log_every": 1, "eval_every": 10, "eval_batches": 2},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False},
    },
)


def run_file(shards: dict[str, str], directory: Path | str, **sections: Any) -> dict[str, Any]:
    """Return the run file of a small run on `shards`, with `sections` merged in."""
    raw = merge_sections(_TRAINED, {"logging": {"directory": str(directory)}})
    raw["data"] |= {"train": [{"path": shards["train"]}], "valid": [{"path": shards["valid"]}]}
    return merge_sections(raw, sections)


def zero(stage: int, **extra: Any) -> dict[str, Any]:
    """Return the `deepspeed` section of a stage. Stage 3 releases every weight."""
    released = RELEASED if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **released, **extra}}


def train(launch: Launch, raw: dict[str, Any], **options: Any) -> None:
    """Train a run file as a launcher would, inside a rank of `tests.helpers.ranks.run_ranks`."""
    from megalite.train import RunOptions, run

    run(RunOptions(parse_config(raw), **options), launch)


def rows(raw: dict[str, Any], kind: str = "train") -> list[dict[str, Any]]:
    """Return the rows of one kind in the run's metrics.jsonl."""
    path = Path(raw["logging"]["directory"]) / raw["name"] / "metrics.jsonl"
    every = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in every if row["kind"] == kind]


def curve(raw: dict[str, Any], first: int = 1) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of the steps from `first` on. Later rows of a step count."""
    by_step = {row["step"]: (row["loss"], row["grad_norm"]) for row in rows(raw)}
    return [by_step[step] for step in sorted(by_step) if step >= first]
