# covers: megalite/model/init.py
"""Initial weights depend on (seed, name, block), and not on the split, the order or the dtype."""

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

# no size is a multiple of the 128 rows of a block
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
    """The parameters of one tensor rank, filled with a wrong value."""

    def __init__(self, config: ModelConfig, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.named = [
            (
                row.name,
                nn.Parameter(
                    torch.full(arch.local_shape(row, Mesh(tensor=size).at(0)), 9.0, dtype=dtype)
                ),
            )
            for row in arch.parameters(config)
        ]

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.named)


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
    """Return whole tensors, assembled from the parts of all ranks."""
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
def test_initial_weights_do_not_depend_on_the_number_of_ranks(overrides: dict[str, Any]) -> None:
    config = model_config(**WIDE, **overrides)
    one = canonical(config, 1)
    assert not any(tensor.isnan().any() for tensor in one.values())
    for size in (2, 4):
        parts = canonical(config, size)
        assert [name for name in one if not torch.equal(one[name], parts[name])] == []


def test_initial_padding_of_the_vocabulary_is_zero() -> None:
    config = model_config(**WIDE)  # 301 rows over 4 ranks: 76, 76, 76 and 73
    local = Local(config, 4)
    start(local, config, size=4, rank=3)
    embedding = dict(local.named_parameters())["model.embed_tokens.weight"]
    assert embedding.shape[0] == 76
    assert (embedding[:73] != 0).all()
    assert not embedding[73:].any()


def test_initialize_draws_only_the_blocks_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are drawn in whole blocks. Columns are cut from whole rows."""
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


def test_initialize_gives_equal_weights_to_a_model_and_its_table() -> None:
    config = model_config(**WIDE)
    local = Local(config, 1)
    start(local, config)
    for (name, ours), (other, theirs) in zip(
        make_model(config).named_parameters(), local.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs), name


def test_initial_weights_do_not_depend_on_the_order_of_parameters() -> None:
    config = model_config(**WIDE)
    forwards, backwards = Local(config, 1), Local(config, 1)
    backwards.named.reverse()
    torch.manual_seed(1)
    start(forwards, config)
    torch.manual_seed(2)
    start(backwards, config)
    reversed_order = dict(backwards.named_parameters())
    assert all(torch.equal(p, reversed_order[name]) for name, p in forwards.named_parameters())


def test_initialize_does_not_change_the_global_generator() -> None:
    before = torch.get_rng_state()
    make_model(model_config())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_initial_weights_in_other_precisions_are_rounded_fp32_numbers(dtype: torch.dtype) -> None:
    config = model_config(**WIDE)
    exact, rounded = Local(config, 1), Local(config, 1, dtype)
    start(exact, config)
    start(rounded, config)
    for (name, ours), (_, theirs) in zip(exact.named, rounded.named, strict=True):
        assert torch.equal(ours.to(dtype), theirs), name


def test_initial_weights_do_not_depend_on_the_default_device() -> None:
    """Engines build under `with device:`, but numbers are drawn on the CPU."""
    config = model_config()
    expected = make_model(config)
    with torch.device("meta"):
        key = module._key(5, "model.embed_tokens.weight", 0)
    assert key == module._key(5, "model.embed_tokens.weight", 0)
    with torch.device("cpu"):
        built = make_model(config)
    for ours, theirs in zip(expected.parameters(), built.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_initial_weights_differ_by_seed_name_and_block() -> None:
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
def test_initial_weights_have_the_distribution_of_their_kind(layers: int) -> None:
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
            assert tensor.abs().max() > 3 * std, name  # not truncated


def test_initialize_writes_each_parameter_inside_gather() -> None:
    """An empty parameter is skipped, because another rank writes it."""
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
