# covers: megalite/model/init.py
"""Initial weights: a function of (seed, name, block), whatever the split, the order, the type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from megalite import arch
from megalite.config import ModelConfig
from megalite.mesh import Mesh
from megalite.model import build, initialize
from megalite.model import init as module
from tests.helpers.models import make_model, model_config

# blocks of 128 rows begin inside q, k, v, gate, up and the vocabulary, and none ends with them
WIDE: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 36,
    "attention_bias": True,
    "mlp_bias": True,
}


class Local(nn.Module):
    """The parameters one tensor-parallel rank holds, full of rubbish."""

    def __init__(self, config: ModelConfig, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.held = [
            (
                row.name,
                nn.Parameter(
                    torch.full(arch.local_shape(row, Mesh(tensor=size).at(0)), 9.0, dtype=dtype)
                ),
            )
            for row in arch.parameters(config)
        ]

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.held)


def start(
    local: Local, config: ModelConfig, *, seed: int = 5, size: int = 1, rank: int = 0
) -> None:
    initialize(
        local,
        config,
        seed=seed,
        gather=lambda _: nullcontext(),
        at=Mesh(tensor=size).at(rank),
    )


def canonical(config: ModelConfig, size: int, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Whole tensors put together from the parts of all ranks."""
    rows = {row.name: row for row in arch.parameters(config)}
    whole = {name: torch.full(t.shape, torch.nan) for name, t in arch.tensors(config).items()}
    for rank in range(size):
        local = Local(config, size)
        start(local, config, size=size, rank=rank, **kwargs)
        for name, parameter in local.named_parameters():
            for piece in arch.pieces(rows[name], Mesh(tensor=size).at(rank)):
                whole[piece.tensor.name][piece.source] = parameter.detach()[piece.target]
    return whole


@pytest.mark.parametrize("overrides", [{}, {"activation": "gelu", "norm": "layernorm"}])
def test_every_split_starts_from_the_same_weights(overrides: dict[str, Any]) -> None:
    config = model_config(**WIDE, **overrides)
    one = canonical(config, 1)
    assert not any(tensor.isnan().any() for tensor in one.values())
    for size in (2, 4):
        parts = canonical(config, size)
        assert [name for name in one if not torch.equal(one[name], parts[name])] == []


def test_padding_of_the_vocabulary_is_zero() -> None:
    config = model_config(**WIDE)  # 301 rows over 4 ranks: 76, 76, 76 and 73
    local = Local(config, 4)
    start(local, config, size=4, rank=3)
    held = dict(local.named_parameters())["model.embed_tokens.weight"]
    assert held.shape[0] == 76
    assert (held[:73] != 0).all()
    assert not held[73:].any()


def test_a_rank_draws_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows in whole blocks; columns are cut from whole rows."""
    config = model_config(**(WIDE | {"vocab_size": 4096, "num_hidden_layers": 1}))
    drawn: list[int] = []
    randn = torch.randn

    def counted(shape: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
        drawn.append(math.prod(shape))
        return randn(shape, **kwargs)

    monkeypatch.setattr(module.torch, "randn", counted)
    start(Local(config, 1), config)
    whole = sum(drawn)
    assert whole == sum(t.elements for t in arch.tensors(config).values() if len(t.shape) > 1)
    drawn.clear()
    start(Local(config, 4), config, size=4, rank=2)
    assert sum(drawn) < 0.4 * whole


def test_the_model_of_one_rank_is_the_table_filled() -> None:
    config = model_config(**WIDE)
    local = Local(config, 1)
    start(local, config)
    for (name, ours), (other, theirs) in zip(
        make_model(config).named_parameters(), local.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs), name


def test_the_order_of_writing_does_not_matter() -> None:
    config = model_config(**WIDE)
    forwards, backwards = Local(config, 1), Local(config, 1)
    backwards.held.reverse()
    torch.manual_seed(1)
    start(forwards, config)
    torch.manual_seed(2)
    start(backwards, config)
    found = dict(backwards.named_parameters())
    assert all(torch.equal(p, found[name]) for name, p in forwards.named_parameters())


def test_no_global_generator_is_read_or_moved() -> None:
    before = torch.get_rng_state()
    make_model(model_config())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_rounds_the_same_numbers(dtype: torch.dtype) -> None:
    config = model_config(**WIDE)
    exact, rounded = Local(config, 1), Local(config, 1, dtype)
    start(exact, config)
    start(rounded, config)
    for (name, ours), (_, theirs) in zip(exact.held, rounded.held, strict=True):
        assert torch.equal(ours.to(dtype), theirs), name


def test_a_default_device_does_not_change_the_numbers() -> None:
    """Engines build under `with device:`; the draws stay on the CPU."""
    config = model_config()
    expected = make_model(config)
    with torch.device("meta"):
        generator_free = module._key(5, "model.embed_tokens.weight", 0)
    assert generator_free == module._key(5, "model.embed_tokens.weight", 0)
    with torch.device("cpu"):
        found = make_model(config)
    for ours, theirs in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_seeds_names_and_blocks_differ() -> None:
    config = model_config(**WIDE, num_hidden_layers=2)
    first, again, second = canonical(config, 1), canonical(config, 1), canonical(config, 1, seed=6)
    drawn = [name for name, tensor in first.items() if tensor.dim() > 1]
    assert all(torch.equal(first[name], again[name]) for name in drawn)
    assert not any((first[name] == second[name]).float().mean() > 0.01 for name in drawn)
    layers = [first[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 1)]
    pair = [first[f"model.layers.0.mlp.{kind}_proj.weight"] for kind in ("gate", "up")]
    rows = first["model.embed_tokens.weight"]
    for ours, theirs in (layers, pair, (rows[:128], rows[128:256])):
        assert abs(torch.corrcoef(torch.stack((ours.flatten(), theirs.flatten())))[0, 1]) < 0.03


@pytest.mark.parametrize("layers", [1, 3])
def test_what_each_kind_starts_as(layers: int) -> None:
    config = model_config(
        **WIDE, num_hidden_layers=layers, norm="layernorm", initializer_range=0.07
    )
    for name, tensor in canonical(config, 1).items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        else:
            ends = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.07 / math.sqrt(2 * layers) if ends else 0.07
            n = tensor.numel()
            assert tensor.std().item() == pytest.approx(std, rel=4 / math.sqrt(n)), name
            assert abs(tensor.mean().item()) < 5 * std / math.sqrt(n), name
            assert tensor.abs().max() > 3 * std, name  # not cut off


def test_parameters_are_written_inside_their_gathering() -> None:
    """One at a time, and one that is not here is left to the rank that has it."""
    config = model_config()
    model = build(config)
    missing = model.get_parameter("model.norm.weight")
    missing.data = torch.empty(0)
    opened: list[int] = []

    @contextmanager
    def gather(parameter: nn.Parameter) -> Iterator[None]:
        opened.append(parameter.numel())
        yield

    initialize(model, config, seed=1, gather=gather)
    assert opened == [p.numel() for p in model.parameters()]
    assert missing.numel() == 0
