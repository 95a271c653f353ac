# covers: megalite/model/matmul.py
"""A model that is prepared for decoding gives the same numbers as before."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from megalite.config import ModelConfig
from megalite.model import build, initialize
from megalite.model.matmul import small_batch_linear


@pytest.mark.parametrize("shape", [(48, 1), (1, 1, 48), (2, 1, 48), (8, 48), (33, 48), (3, 5, 48)])
@pytest.mark.parametrize("columns", [False, True])
def test_small_batch_linear_equals_linear(shape: tuple[int, ...], columns: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(96, shape[-1]), torch.randn(96)
    if columns:
        weight = weight.t().contiguous().t()
    with torch.inference_mode():
        torch.testing.assert_close(small_batch_linear(x, weight), F.linear(x, weight))
        torch.testing.assert_close(small_batch_linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_prepare_for_decoding_changes_only_the_memory_layout(architecture: str, tied: bool) -> None:
    config = ModelConfig.model_validate(
        {
            "architecture": architecture,
            "vocab_size": 101,
            "hidden_size": 32,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            "attention_bias": True,
        }
    )
    model = build(config).eval()
    initialize(model, config, seed=1, gather=lambda _: nullcontext())
    batch = {
        "input_ids": torch.randint(101, (3, 7)),
        "decoder_input_ids": torch.randint(101, (3, 2)),
    }
    with torch.inference_mode():
        before = model.logits(batch)
        state = {name: value.clone() for name, value in model.state_dict().items()}
    model.prepare_for_decoding()
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(batch), before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.head_weight.stride() == (1, 101)
