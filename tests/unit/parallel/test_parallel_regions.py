# covers: megalite/parallel/regions.py megalite/parallel/tensor.py megalite/model/regions.py
"""Regions of two ranks give the numbers of one device. On one device regions do nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite import arch
from megalite.config import ModelConfig
from megalite.env import Launch
from megalite.mesh import Mesh
from megalite.model import ONE_DEVICE, build, initialize
from megalite.model.matmul import matmul
from tests.helpers.models import loss_of, make_batch, make_model, model_config
from tests.helpers.ranks import run_ranks

LORA = {"rank": 2, "targets": ["q_proj", "v_proj", "o_proj", "down_proj"]}
MODELS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "tied, odd vocabulary": {"tie_word_embeddings": True, "vocab_size": 61},
    "adapters": {"adapter": LORA, "attention_bias": True, "mlp_bias": True},
    "norms of heads": {"qk_norm": True},
    "relative": {"architecture": "encoder_decoder", "position_embedding": "relative"},
    "encoder": {"architecture": "encoder", "norm": "layernorm", "position_embedding": "learned"},
}


def batch_of(config: ModelConfig) -> dict[str, Tensor]:
    tensors = dict(make_batch(config).tensors)
    if config.architecture == "encoder_decoder":
        tensors["decoder_input_ids"] = tensors["input_ids"]
    return tensors


def on_two_ranks(launch: Launch, section: dict[str, Any], sequence: bool) -> dict[str, Any]:
    """Return the loss, the logits and this rank's gradients of a model that two ranks share."""
    from megalite.parallel import apply_tensor_parallel, make_regions, start

    grid = start(launch, tensor=2)
    config = model_config(**section)
    model = build(config, make_regions(config, grid, sequence=sequence))
    initialize(model, config, seed=5, gather=lambda _: nullcontext(), at=grid.at)
    apply_tensor_parallel(model, config, grid, sequence=sequence)
    loss = loss_of(model, batch_of(config))
    loss.backward()
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    result = {"loss": loss.item(), "grads": grads}
    if not sequence:
        with torch.no_grad():
            result["logits"] = model.logits(batch_of(config)).numpy()
    return result


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_regions_of_two_ranks_give_the_loss_logits_and_gradients_of_one_device(
    name: str, sequence: bool
) -> None:
    config = model_config(**MODELS[name])
    model = make_model(config)
    loss = loss_of(model, batch_of(config))
    loss.backward()
    close = {"rtol": 1e-4, "atol": 1e-6}
    for rank, result in enumerate(run_ranks(on_two_ranks, 2, MODELS[name], sequence)):
        assert result["loss"] == pytest.approx(loss.item(), rel=1e-6)
        if not sequence:
            logits = model.logits(batch_of(config)).detach()
            torch.testing.assert_close(torch.from_numpy(result["logits"]), logits, **close)
        at = Mesh(data=1, tensor=2).at(rank)
        for row in arch.parameters(config):
            grad = model.get_parameter(row.name).grad
            if grad is None:
                assert row.name not in result["grads"]
                continue
            whole = {piece.tensor.name: grad[piece.target] for piece in arch.pieces(row)}
            for piece in arch.pieces(row, at):
                part = torch.from_numpy(result["grads"][row.name])[piece.target]
                expected = whole[piece.tensor.name][piece.source]
                torch.testing.assert_close(part, expected, **close, msg=row.name)


def test_regions_of_one_device_are_identities() -> None:
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    for region in (ONE_DEVICE.copy, ONE_DEVICE.reduce, ONE_DEVICE.gather):
        assert region(x) is x
    assert ONE_DEVICE.gather_vocabulary(x) is x
    assert ONE_DEVICE.scatter(x) is x
    assert torch.equal(ONE_DEVICE.column_linear(x, weight, matmul), F.linear(x, weight))
    ids = torch.tensor([[1, 4]])
    assert torch.equal(ONE_DEVICE.embed(ids, weight), weight[ids])
    config = model_config()
    assert ONE_DEVICE.shard_config(config) is config
    torch.manual_seed(1)
    with ONE_DEVICE.head_randomness(x, dropout=True):
        drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))


def vocabulary_of(launch: Launch) -> tuple[int, int, bool]:
    from megalite.parallel import make_regions, start

    grid = start(launch, tensor=2)
    config = model_config(vocab_size=61)
    regions = make_regions(config, grid)
    assert regions.vocabulary is not None
    grid.barrier()  # rank 0 holds the store by which the other forms its groups
    return regions.vocabulary.first, regions.vocabulary.unpadded_rows, regions.size == 2


def test_vocabulary_that_ranks_do_not_divide_has_fewer_rows_on_the_last_rank() -> None:
    assert run_ranks(vocabulary_of, 2) == [(0, 31, True), (31, 30, True)]


def replicated_gradients(launch: Launch, section: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's gradients of replicated parameters, with dropout."""
    from megalite.parallel import apply_tensor_parallel, make_regions, start

    grid = start(launch, tensor=2)
    config = model_config(**section)
    model = build(config, make_regions(config, grid, sequence=True))
    initialize(model, config, seed=5, gather=lambda _: nullcontext(), at=grid.at)
    apply_tensor_parallel(model, config, grid, sequence=True)
    torch.manual_seed(7)
    batch = batch_of(config) | {"lengths": torch.tensor([5, 8])}
    if config.num_labels:
        model.label_scores(batch)[:, 0].sum().backward()
    else:
        loss_of(model, batch).backward()
    names = ("score.weight", "model.decoder.embed_positions.weight")
    gradients = {
        n: p.grad.tolist() for n, p in model.named_parameters() if n in names and p.grad is not None
    }
    grid.barrier()
    return gradients


@pytest.mark.parametrize(
    "section",
    [
        {"architecture": "encoder", "num_labels": 2},
        {"architecture": "encoder_decoder", "position_embedding": "learned"},
    ],
    ids=["pooled state of a classifier", "embeddings of a decoder"],
)
def test_dropout_of_replicated_states_is_equal_under_sequence_parallelism(
    section: dict[str, Any],
) -> None:
    first, second = run_ranks(replicated_gradients, 2, section | {"hidden_dropout": 0.5})
    assert len(first) == 1
    assert first == second
