# covers: megalite/optim/muon.py
"""Muon's update, compared with singular values and with an explicit step."""

from __future__ import annotations

import pytest
import torch

from megalite.optim import Muon
from megalite.optim.muon import newton_schulz
from tests.helpers.models import make_batch, make_engine

OPTIMIZER = {"name": "muon", "momentum": 0.95, "weight_decay": 0.1, "clip_grad_norm": 0.0}


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 1e-4
    orthogonal = newton_schulz(matrix)
    values = torch.linalg.svdvals(orthogonal)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.t() @ orthogonal @ right.t()  # diagonal if the singular vectors are the same
    assert float((inner - inner.diagonal().diag()).norm() / inner.norm()) < 1e-3
    assert torch.equal(newton_schulz(torch.zeros(shape)), torch.zeros(shape))


def test_muon_equals_an_explicit_update_for_two_steps() -> None:
    """q, k and v are orthogonalised separately, although they are fused in memory."""
    trained = make_engine(optimizer=OPTIMIZER)
    assert isinstance(trained.optimizer, Muon)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    weight = trained.model.get_parameter(name)
    expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
    gradients: list[torch.Tensor] = []
    for step, lr in ((1, 0.02), (2, 0.01)):
        batch = make_batch(trained.config.model, seed=step)
        trained.train_step(
            [batch],
            divisor=batch.targets,
            lr=lr,
            step=step,
            inspect=lambda: gradients.append(weight.grad.clone()),
        )
        momentum = 0.95 * momentum + 0.05 * gradients[-1]
        update = 0.05 * gradients[-1] + 0.95 * momentum
        parts = [
            newton_schulz(part) * 0.2 * max(part.shape) ** 0.5
            for part in update.split((24, 12, 12))
        ]
        expected = expected * (1 - 0.1 * lr) - lr * torch.cat(parts)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)


def test_muon_updates_the_matrices_of_blocks_only() -> None:
    trained = make_engine(optimizer=OPTIMIZER)
    states = {
        name: set(trained.optimizer.state[parameter])
        for name, parameter in trained.model.named_parameters()
    }
    for name, names in states.items():
        is_matrix = ".layers." in name and "norm" not in name
        assert names == ({"momentum_buffer"} if is_matrix else {"exp_avg", "exp_avg_sq", "step"}), (
            name
        )
