# covers: megalite/optim/optimizers.py megalite/engine/reference.py
"""Optimizers compared with explicit updates in float64, and the parameters that decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalite import arch, registry
from megalite.engine.reference import (
    ReferenceEngine,
    clip_gradients,
    create_states,
    set_update_count,
    total_norm,
    update_count,
)
from megalite.model import build
from megalite.optim import make_optimizer
from megalite.plan.optimizer import state_names
from tests.helpers.models import SINGLE_RANK, loss_of, make_batch, make_model, run_config

DECAYED, FREE = "lm_head.weight", "model.norm.weight"


def setting(**optimizer: Any) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """Return an optimizer over a matrix and a norm of the small model."""
    config = run_config(optimizer=optimizer)
    model = make_model(config.model, spread=0.05)
    named = {name: model.get_parameter(name) for name in (DECAYED, FREE)}
    return make_optimizer(config, named.items()), named


def gradients(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        DECAYED: torch.randn(61, 24, generator=generator),
        FREE: torch.randn(24, generator=generator),
    }


def run(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], lrs: list[float]) -> None:
    for step, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, grad in gradients(step).items():
            named[name].grad = grad
        optimizer.step()


def check_equal(parameters: dict[str, nn.Parameter], expected: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=2e-6, atol=1e-7)


LRS = [0.01, 0.02, 0.005, 0.0, 0.01]


def test_adamw_equals_the_update_of_the_paper() -> None:
    """Loshchilov & Hutter 2019, algorithm 2: the moments do not include the decay."""
    b1, b2, eps, decay = 0.8, 0.9, 1e-3, 0.3
    optimizer, named = setting(name="adamw", betas=[b1, b2], eps=eps, weight_decay=decay, lr=9.0)
    expected = {name: p.detach().double() for name, p in named.items()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, lr in enumerate(LRS):
        for name, grad in gradients(step).items():
            g, w = grad.double(), expected[name]
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            corrected = m[name] / (1 - b1 ** (step + 1))
            root = (v[name] / (1 - b2 ** (step + 1))).sqrt()
            shrink = lr * decay * w if name == DECAYED else 0
            expected[name] = w - lr * corrected / (root + eps) - shrink
    run(optimizer, named, LRS)
    check_equal(named, expected)
    for name, parameter in named.items():
        state = optimizer.state[parameter]
        torch.testing.assert_close(state["exp_avg"].double(), m[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state["exp_avg_sq"].double(), v[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_sgd_equals_an_explicit_update_with_decoupled_decay(momentum: float, decay: float) -> None:
    optimizer, named = setting(name="sgd", momentum=momentum, weight_decay=decay)
    expected = {name: p.detach().double() for name, p in named.items()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, lr in enumerate(LRS):
        for name, grad in gradients(step).items():
            velocity[name] = momentum * velocity[name] + grad.double()
            factor = 1 - lr * decay if name == DECAYED else 1
            expected[name] = factor * expected[name] - lr * velocity[name]
    run(optimizer, named, LRS)
    check_equal(named, expected)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_l1_is_the_proximal_step_after_the_update(name: str) -> None:
    settings = {"name": name, "weight_decay": 0.2}
    plain, without = setting(**settings)
    proximal, named = setting(**settings, l1=1.5)
    run(plain, without, [0.01])
    run(proximal, named, [0.01])
    moved = without[DECAYED].detach().double()
    expected = moved.sign() * (moved.abs() - 0.01 * 1.5).clamp(min=0)
    torch.testing.assert_close(named[DECAYED].double(), expected, rtol=1e-5, atol=1e-7)
    zeros = (named[DECAYED] == 0).float().mean().item()
    assert zeros == (expected == 0).float().mean().item()
    assert 0.05 < zeros < 0.95
    assert torch.equal(named[FREE], without[FREE])


def test_l1_sets_unused_weights_to_exactly_zero() -> None:
    optimizer, named = setting(name="sgd", momentum=0.0, weight_decay=0.0, l1=1.0)
    weight = named[DECAYED]
    with torch.no_grad():
        weight.uniform_(-0.035, 0.035)
    norm = named[FREE].detach().clone()
    for _ in range(4):
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # each step moves weights by 0.01 towards zero
    assert not weight.any()
    assert torch.equal(named[FREE], norm)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_applies_to_matrices_only(name: str) -> None:
    config = run_config(
        optimizer={"name": name, "weight_decay": 0.5, "lr": 0.1},
        model={
            "norm": "layernorm",
            "attention_bias": True,
            "mlp_bias": True,
            "position_embedding": "learned",
        },
    )
    model = make_model(config.model, spread=0.3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(config, model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for n, parameter in model.named_parameters():
        factor = 1.0 if n.endswith("bias") or "norm" in n else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), factor * before[n], rtol=1e-6, atol=0)


def test_optimizer_groups_separate_matrices_from_vectors() -> None:
    config = run_config(
        model={"norm": "layernorm", "attention_bias": True}, optimizer={"l1": 0.3, "lr": 0.7}
    )
    model = build(config.model)
    optimizer = make_optimizer(config, model.named_parameters())
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert list(groups) == ["decay", "no_decay"]
    names = {id(p): name for name, p in model.named_parameters()}
    vectors = {names[id(p)] for p in groups["no_decay"]["params"]}
    assert vectors == {n for n in names.values() if n.endswith("bias") or "norm" in n}
    both = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(both) == sorted(names.values())
    settings = {n: (g["weight_decay"], g["l1"], g["lr"]) for n, g in groups.items()}
    assert settings == {"decay": (0.1, 0.3, 0.7), "no_decay": (0.0, 0.0, 0.7)}


def test_optimizer_of_matrices_only_has_one_group() -> None:
    """A rank's partition may have parameters of one kind."""
    config = run_config()
    weight = build(config.model).get_parameter(DECAYED)
    groups = make_optimizer(config, [(DECAYED, weight)]).param_groups
    assert [group["name"] for group in groups] == ["decay"]


@pytest.mark.parametrize("extra", [{}, {"l1": 0.1}])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_parameters_without_a_gradient_do_not_change(name: str, extra: dict[str, float]) -> None:
    """Frozen parameters get neither decay nor update, even if all of a group are frozen."""
    optimizer, named = setting(name=name, weight_decay=0.5, **extra)
    before = named[DECAYED].detach().clone()
    named[FREE].grad = torch.ones(24)
    optimizer.step()
    assert torch.equal(named[DECAYED], before)


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        ({"name": "adamw"}, ("exp_avg", "exp_avg_sq")),
        ({"name": "sgd"}, ("momentum_buffer",)),
        ({"name": "sgd", "momentum": 0.0}, ()),
    ],
)
def test_states_created_in_advance_equal_those_that_a_step_creates(
    optimizer: dict[str, Any], names: tuple[str, ...]
) -> None:
    """The first step from these states equals a first step without them."""
    config = run_config(optimizer=optimizer)
    assert {state_names(config, row) for row in arch.parameters(config.model)} == {names}
    ahead, eager = (setting(**optimizer) for _ in range(2))
    create_states(ahead[0])
    run(*ahead, [0.01, 0.01])
    run(*eager, [0.01, 0.01])
    for key in (DECAYED, FREE):
        assert torch.equal(ahead[1][key], eager[1][key])
        created = {k for k, v in eager[0].state[eager[1][key]].items() if v is not None}
        assert created == {*names, "step"} if "exp_avg" in names else created == set(names)
        assert set(ahead[0].state[ahead[1][key]]) == created or not names


def test_update_count_is_counted_and_restored() -> None:
    optimizer, named = setting(name="adamw")
    create_states(optimizer)
    assert update_count(optimizer) == 0
    run(optimizer, named, [0.01] * 3)
    assert update_count(optimizer) == 3
    set_update_count(optimizer, 41)
    run(optimizer, named, [0.01])
    assert update_count(optimizer) == 42
    sgd, _ = setting(name="sgd")
    create_states(sgd)
    set_update_count(sgd, None)
    assert update_count(sgd) is None


class RootMean(torch.optim.Optimizer):
    """RMSProp with bias correction. It counts updates, and has no `exp_avg`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                state["step"] += 1
                state["square"].lerp_(parameter.grad.square(), 0.1)
                mean = state["square"] / (1 - 0.9 ** float(state["step"]))
                parameter.addcdiv_(parameter.grad, mean.sqrt() + 1e-8, value=-group["lr"])


def test_update_count_of_an_optimizer_without_adams_states_is_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        registry.optimizers._facts, "sgd", {"states": ("square",), "counts_steps": True}
    )
    monkeypatch.setitem(
        registry.optimizers._entries,
        "sgd",
        lambda section, groups: RootMean(groups, {"lr": section.lr}),
    )
    first, parameters = setting(name="sgd")
    create_states(first)
    run(first, parameters, [0.01] * 3)
    second, restored = setting(name="sgd")
    create_states(second)
    with torch.no_grad():
        for key, parameter in parameters.items():
            restored[key].copy_(parameter)
            second.state[restored[key]]["square"].copy_(first.state[parameter]["square"])
    assert update_count(first) == 3
    set_update_count(second, update_count(first))
    run(first, parameters, [0.01])
    run(second, restored, [0.01])
    assert update_count(second) == 4
    for key, parameter in parameters.items():
        assert torch.equal(restored[key], parameter)


@pytest.mark.parametrize("limit", [None, 0.0, 1.0, 5.0, 100.0])
def test_clip_gradients_scales_down_to_the_limit(limit: float | None) -> None:
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 7, 2)]
    parameters[0].grad = torch.tensor([2.0, -4.0, 4.0])
    parameters[1].grad = torch.full((7,), 1.0)
    norm = clip_gradients(parameters, limit)
    assert float(norm) == pytest.approx(math.sqrt(36 + 7))
    factor = min(1.0, limit / math.sqrt(43)) if limit else 1.0
    assert parameters[0].grad.tolist() == pytest.approx([2 * factor, -4 * factor, 4 * factor])
    assert parameters[1].grad.tolist() == pytest.approx([factor] * 7)
    assert parameters[2].grad is None


# --- a whole step of the reference engine ---


def engine(**sections: Any) -> ReferenceEngine:
    return ReferenceEngine(run_config(**sections), grid=SINGLE_RANK)


def test_micro_batches_do_not_change_a_step() -> None:
    """The micro-batches have different numbers of targets; the mean is over all targets."""
    sections = {"model": {"tie_word_embeddings": True}}
    one, many = engine(**sections), engine(**sections)
    parts = [make_batch(one.config.model, samples=2, seed=seed) for seed in range(3)]
    parts[1] = parts[1].first(1)
    whole = make_batch(one.config.model, samples=6)
    for name in whole.tensors:
        whole.tensors[name] = torch.cat([part.tensors[name] for part in parts])
    divisor = sum(part.targets for part in parts)
    for step in (1, 2):
        expected = one.train_step([whole], divisor=divisor, lr=0.01, step=step)
        result = many.train_step(parts, divisor=divisor, lr=0.01, step=step)
        assert float(result.loss) == pytest.approx(float(expected.loss), rel=1e-6)
        assert float(result.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-5)
    for ours, theirs in zip(many.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_train_step_clips_before_it_updates() -> None:
    """SGD without momentum and decay moves the weights by lr x the clipped gradient."""
    sgd = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_grad_norm": 0.01}
    trained = engine(optimizer=sgd)
    before = [p.detach().clone() for p in trained.model.parameters()]
    batch = make_batch(trained.config.model)
    result = trained.train_step([batch], divisor=batch.targets, lr=0.5, step=1)
    assert float(result.grad_norm) > 0.1
    moved = [p.detach() - b for p, b in zip(trained.model.parameters(), before, strict=True)]
    length = math.sqrt(sum(m.double().pow(2).sum().item() for m in moved))
    assert length == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert all(p.grad is None for p in trained.model.parameters())


def test_dropout_is_a_function_of_seed_step_and_place() -> None:
    def losses(seed: int = 3, steps: tuple[int, ...] = (1, 2), place: int = 0) -> list[float]:
        trained = engine(model={"hidden_dropout": 0.3}, training={"seed": seed})
        start = make_model(trained.config.model)  # the same weights for each seed
        trained.model.load_state_dict(start.state_dict())
        batch = make_batch(trained.config.model)
        batch = type(batch)(batch.tensors, place, batch.targets)
        torch.manual_seed(place + 7)  # the earlier state of the generator has no effect
        return [
            float(trained.train_step([batch], divisor=1.0, lr=0.0, step=step).loss)
            for step in steps
        ]

    first = losses()
    assert first == losses()
    assert first[::-1] == losses(steps=(2, 1))
    different = {*first, *losses(seed=4), *losses(place=2)}
    assert len(different) == 6


def test_eval_loss_has_no_dropout() -> None:
    trained = engine(model={"hidden_dropout": 0.3})
    batch = make_batch(trained.config.model)
    expected = make_model(trained.config.model, seed=trained.config.training.seed).eval()
    loss = trained.eval_loss(batch)
    expected_loss = loss_of(expected, batch.tensors).item()
    assert loss.item() == expected_loss == trained.eval_loss(batch).item()


def test_table_of_parameters_decays_matrices_only() -> None:
    config = run_config(model={"norm": "layernorm", "mlp_bias": True, "activation": "relu"})
    for row in arch.parameters(config.model):
        assert row.decay == (len(arch.local_shape(row)) == 2), row.name


def test_total_norm_of_a_long_gradient_is_exact() -> None:
    """On a CPU, PyTorch's norm of 16 million elements has an error of 6e-4."""
    long = torch.randn(4_000_001, generator=torch.Generator().manual_seed(1)) * 1e-3
    norm = total_norm([long, torch.ones(3, 2), torch.zeros(0)])
    exact = (long.double().square().sum() + 6).sqrt()
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(exact), rel=1e-7)
