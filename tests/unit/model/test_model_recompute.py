# covers: megalite/parallel/apply.py
"""Recompute changes only which activations are saved between forward and backward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from megalite.model import LanguageModel
from megalite.parallel import apply, apply_recompute_and_compile
from tests.helpers.models import loss_of, make_batch, make_model, model_config

PRODUCTS = ("mm", "addmm", "bmm")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Watch(TorchDispatchMode):
    """Counter of operators, and of bytes of created tensors that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._created: dict[int, tuple[StorageWeakRef, int]] = {}
        self._inputs: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func.overloadpacket).removeprefix("aten.")] += 1
        # views of weights and of the batch do not count as created
        self._inputs |= {r.cdata for r, _ in self._storages((args, kwargs))} - self._created.keys()
        result = func(*args, **(kwargs or {}))
        for reference, size in self._storages(result):
            if reference.cdata not in self._inputs:
                self._created[reference.cdata] = (reference, size)
        return result

    @staticmethod
    def _storages(tree: Any) -> list[tuple[StorageWeakRef, int]]:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return [(StorageWeakRef(storage), storage.nbytes()) for storage in storages]

    def alive_bytes(self) -> int:
        return sum(size for reference, size in self._created.values() if not reference.expired())

    def products(self) -> int:
        return sum(self.calls[name] for name in PRODUCTS)


def make(recompute: str, **overrides: Any) -> LanguageModel:
    config = model_config(**overrides)
    model = make_model(config, spread=0.1)
    apply_recompute_and_compile(model.blocks, recompute=recompute, compile_blocks=False)
    return model.train()


def packed(samples: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    tensors = make_batch(model_config(), samples=samples, length=length).tensors
    documents = (torch.arange(length) >= length // 2).long().expand(samples, length)
    positions = torch.arange(length) % (length // 2)
    return tensors | {"document_ids": documents, "position_ids": positions.expand(samples, length)}


def step(model: LanguageModel, batch: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(77)
    loss = loss_of(model, batch)
    torch.manual_seed(78)  # the backward must not depend on the generator's state
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recompute_gives_equal_losses_and_gradients(
    recompute: str, masked: bool, dropout: float
) -> None:
    overrides = {"hidden_dropout": dropout, "attention_dropout": dropout, "mlp_bias": True}
    batch = packed() if masked else make_batch(model_config(), length=16).tensors
    expected, gradients = step(make("none", **overrides), batch)
    loss, recomputed = step(make(recompute, **overrides), batch)
    assert loss == expected
    assert len(recomputed) == len(gradients) == len(list(make("none", **overrides).parameters()))
    for ours, theirs in zip(recomputed, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_dropout_changes_the_loss() -> None:
    """Otherwise the test above would have no effect."""
    batch = make_batch(model_config(), length=16).tensors
    for kind in ("hidden_dropout", "attention_dropout"):
        assert step(make("none", **{kind: 0.3}), batch)[0] != step(make("none"), batch)[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_recompute_repeats_products_only_if_full(dropout: float, masked: bool) -> None:
    batch = packed() if masked else make_batch(model_config(), length=16).tensors
    backward: dict[str, Watch] = {}
    for recompute in ("none", "selective", "full"):
        loss = loss_of(make(recompute, attention_dropout=dropout), batch)
        with Watch() as backward[recompute]:
            loss.backward()
    none, selective, full = backward.values()
    assert selective.products() == none.products()
    assert full.products() > none.products()
    layers = model_config().num_hidden_layers
    if not dropout:
        counts = [watch.calls[ATTENTION] for watch in (none, selective, full)]
        assert counts == [0, 0, layers]
    # both repeat cheap element-wise operations
    assert [watch.calls["silu"] for watch in (none, selective, full)] == [0, layers, layers]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("_scaled_dot_product_flash_attention", 3),
        ("_scaled_dot_product_efficient_attention", 5),
        ("_scaled_dot_product_cudnn_attention", 5),
    ],
)
def test_attention_with_dropout_is_recomputed(name: str, place: int) -> None:
    """A saved result does not advance the generator, so later dropout would draw another mask.

    The CPU's kernel has no dropout.
    """
    op = getattr(torch.ops.aten, name).default
    assert op._schema.arguments[place].name == "dropout_p"
    policies = {}
    for dropout in (0.0, 0.1):
        arguments = [None] * place + [dropout]
        policies[dropout] = apply._policy(None, op, *arguments)
    assert policies == {0.0: CheckpointPolicy.MUST_SAVE, 0.1: CheckpointPolicy.PREFER_RECOMPUTE}


def test_recompute_reduces_the_saved_bytes() -> None:
    """The bytes are those alive between forward and backward, without the loss."""
    config = model_config(hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    batch = make_batch(config, samples=4, length=32).tensors
    saved = {}
    for recompute in ("none", "selective", "full"):
        model = make_model(config)
        apply_recompute_and_compile(model.blocks, recompute=recompute, compile_blocks=False)
        with Watch() as watch:
            hidden = model.model(batch["input_ids"], {})
        saved[recompute] = watch.alive_bytes()
        assert hidden.requires_grad
    tokens, width = 4 * 32, 64
    inputs = 4 * tokens * width * (config.num_hidden_layers + 3)  # fp32; 3 outside of the blocks
    assert saved["full"] < 1.3 * inputs
    assert saved["full"] < 0.5 * saved["selective"]
    assert saved["selective"] < 0.75 * saved["none"]


def test_evaluation_with_recompute_gives_the_same_loss() -> None:
    model, batch = make("selective"), make_batch(model_config()).tensors
    with torch.no_grad():
        assert loss_of(model, batch).item() == loss_of(make("none"), batch).item()
