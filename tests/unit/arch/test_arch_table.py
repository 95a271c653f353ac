# covers: megalite/arch/table.py megalite/arch/network.py megalite/arch/attention.py
# covers: megalite/arch/ends.py megalite/arch/mlp.py megalite/arch/norms.py
"""The table of parameters: names, order, shapes, and slices that cover each tensor exactly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.arch import (
    Init,
    ParameterSpec,
    Split,
    local_shape,
    needs_tp_grad_sum,
    parameters,
    pieces,
    tensors,
)
from megalite.config import ModelConfig, allowed_tensor_sizes
from megalite.mesh import Mesh

GOLDEN = json.loads(Path(__file__).with_name("parameters.json").read_text("utf-8"))


def model(**changes: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "vocab_size": 101,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 6,
            "max_position_embeddings": 16,
        }
        | changes
    )


FAMILIES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "num_key_value_heads": 8},
    {"norm": "layernorm", "activation": "gelu", "position_embedding": "learned",
     "attention_bias": True, "mlp_bias": True},
    {"activation": "geglu", "mlp_bias": True, "position_embedding": "none", "qk_norm": True},
    {"architecture": "encoder", "norm_position": "post", "embedding_norm": True,
     "norm": "layernorm", "type_vocab_size": 2, "tie_word_embeddings": True},
    {"architecture": "encoder_decoder", "position_embedding": "relative", "norm": "layernorm",
     "attention_bias": True},
    {"num_labels": 3},
]  # fmt: skip


def describe(spec: ParameterSpec) -> list[Any]:
    """Return a parameter in the form of parameters.json."""
    stored = [f"{t.name} {list(t.shape)} {t.split.name}" for t in spec.tensors]
    sums = [needs_tp_grad_sum(spec, sequence=sequence) for sequence in (False, True)]
    slices = [
        str([(p.tensor.name, p.source, p.target) for p in pieces(spec, mesh.at(rank))])
        for mesh in (Mesh(tensor=size) for size in (1, 2, 4))
        for rank in range(mesh.tensor)
    ]
    digest = hashlib.sha256("".join(slices).encode()).hexdigest()[:16]
    shapes = [list(local_shape(spec, Mesh(tensor=size).at(0))) for size in (1, 2, 4)]
    flags = f"{spec.init.name} decay={spec.decay} adapter={spec.is_adapter} sums={sums}"
    return [spec.name, flags, stored, shapes, digest]


def test_parameters_of_llama_have_its_names_in_order() -> None:
    layer = [
        "input_layernorm.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    ]
    assert [p.name for p in parameters(model())] == [
        "model.embed_tokens.weight",
        *(f"model.layers.{n}.{name}" for n in range(2) for name in layer),
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert list(tensors(model()))[:7] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ]


def test_parameters_of_gpt_have_their_names_in_order() -> None:
    names = [p.name for p in parameters(model(**FAMILIES[2], tie_word_embeddings=True))]
    assert names[:2] == ["model.embed_tokens.weight", "model.embed_positions.weight"]
    assert [name.removeprefix("model.layers.1.") for name in names if ".1." in name] == [
        "input_layernorm.weight",
        "input_layernorm.bias",
        "self_attn.qkv_proj.weight",
        "self_attn.qkv_proj.bias",
        "self_attn.o_proj.weight",
        "self_attn.o_proj.bias",
        "post_attention_layernorm.weight",
        "post_attention_layernorm.bias",
        "mlp.up_proj.weight",
        "mlp.up_proj.bias",
        "mlp.down_proj.weight",
        "mlp.down_proj.bias",
    ]
    assert names[-2:] == ["model.norm.weight", "model.norm.bias"]


@pytest.mark.parametrize("kind", GOLDEN)
def test_parameters_are_those_of_the_first_version(kind: str) -> None:
    """All checkpoints so far have these names, order, shapes, splits and slices."""
    section, expected = GOLDEN[kind]["model"], GOLDEN[kind]["parameters"]
    described = [describe(spec) for spec in parameters(ModelConfig(**section))]
    assert described == expected


def test_tensor_shapes_are_out_by_in() -> None:
    shapes = {name: tensor.shape for name, tensor in tensors(model()).items()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (48, 24)
    assert shapes["model.layers.0.self_attn.v_proj.weight"] == (24, 24)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (24, 48)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (40, 24)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (24, 40)
    assert shapes["lm_head.weight"] == (101, 24)


def test_parameters_have_decay_and_initial_values_by_kind() -> None:
    for parameter in parameters(model(**FAMILIES[2])):
        vector = len(parameter.tensors[0].shape) == 1
        assert parameter.decay is not vector
        expected = {
            "norm.weight": Init.ONES,
            "bias": Init.ZEROS,
            "o_proj.weight": Init.SCALED_NORMAL,
            "down_proj.weight": Init.SCALED_NORMAL,
        }
        [*init] = [v for end, v in expected.items() if parameter.name.endswith(end)]
        assert parameter.init is (init[0] if init else Init.NORMAL)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pieces_of_all_ranks_cover_each_tensor_once(family: dict[str, Any], ranks: int) -> None:
    for parameter in parameters(model(**family)):
        covered = {t.name: np.zeros(t.shape, int) for t in parameter.tensors}
        for rank in range(ranks):
            shape = local_shape(parameter, Mesh(tensor=ranks).at(0))
            local = np.zeros(shape, int)
            for piece in pieces(parameter, Mesh(tensor=ranks).at(rank)):
                covered[piece.tensor.name][piece.source] += 1
                local[piece.target] += 1
                assert local[piece.target].shape == covered[piece.tensor.name][piece.source].shape
            assert local.max(initial=0) <= 1
            if parameter.tensors[0].split is not Split.VOCABULARY:
                assert local.min() == 1
        times = ranks if parameter.tensors[0].split is Split.REPLICATED else 1
        assert all((count == times).all() for count in covered.values()), parameter.name


def test_pieces_of_a_rank_are_whole_heads_of_q_k_and_v() -> None:
    qkv = next(p for p in parameters(model()) if p.name.endswith("qkv_proj.weight"))
    assert local_shape(qkv, Mesh(tensor=4).at(0)) == ((8 + 4 + 4) * 6 // 4, 24)
    rows = [piece.source[0] for piece in pieces(qkv, Mesh(tensor=4).at(3))]
    assert rows == [slice(36, 48), slice(18, 24), slice(18, 24)]
    targets = [piece.target[0] for piece in pieces(qkv, Mesh(tensor=4).at(3))]
    assert targets == [slice(0, 12), slice(12, 18), slice(18, 24)]


def test_vocabulary_is_padded_at_its_end() -> None:
    embedding = parameters(model(vocab_size=5))[0]
    assert local_shape(embedding) == (5, 24)
    assert local_shape(embedding, Mesh(tensor=4).at(0)) == (2, 24)
    by_rank = [pieces(embedding, Mesh(tensor=4).at(rank)) for rank in range(4)]
    assert [[p.source[0] for p in part] for part in by_rank] == [
        [slice(0, 2)],
        [slice(2, 4)],
        [slice(4, 5)],
        [],
    ]


def test_allowed_tensor_sizes_divide_heads_and_mlp() -> None:
    assert allowed_tensor_sizes(model()) == [1, 2, 4]
    assert allowed_tensor_sizes(model(intermediate_size=42)) == [1, 2]
    assert allowed_tensor_sizes(model(num_key_value_heads=1)) == [1]
