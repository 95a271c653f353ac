"""The least a run file must say."""

from __future__ import annotations

from typing import Any

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

# sizes that are counted by hand
SMALL_LLAMA: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
