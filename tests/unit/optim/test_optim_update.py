# covers: megalite/optim/optimizers.py megalite/engine/reference.py
"""Update rules against hand-written ones in float64, and what is decayed."""

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


def check_equal(found: dict[str, nn.Parameter], expected: dict[str, Tensor]) -> None:
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=2e-6, atol=1e-7)


LRS = [0.01, 0.02, 0.005, 0.0, 0.01]


def test_adamw_against_the_paper() -> None:
    """Loshchilov & Hutter 2019, algorithm 2: the decay is not part of the moments."""
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
def test_sgd_with_decoupled_decay(momentum: float, decay: float) -> None:
    optimizer, named = setting(name="sgd", momentum=momentum, weight_decay=decay)
    expected = {name: p.detach().double() for name, p in named.items()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, lr in enumerate(LRS):
        for name, grad in gradients(step).items():
            velocity[name] = momentum * velocity[name] + grad.double()
            kept = 1 - lr * decay if name == DECAYED else 1
            expected[name] = kept * expected[name] - lr * velocity[name]
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


def test_l1_brings_unused_weights_to_exact_zero_and_leaves_them_there() -> None:
    optimizer, named = setting(name="sgd", momentum=0.0, weight_decay=0.0, l1=1.0)
    weight = named[DECAYED]
    with torch.no_grad():
        weight.uniform_(-0.035, 0.035)
    norm = named[FREE].detach().clone()
    for _ in range(4):
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # lr 0.01: 0.01 a step
    assert not weight.any()
    assert torch.equal(named[FREE], norm)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_decay_moves_matrices_and_nothing_else(name: str) -> None:
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
        kept = 1.0 if n.endswith("bias") or "norm" in n else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), kept * before[n], rtol=1e-6, atol=0)


def test_the_groups() -> None:
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


def test_a_rank_without_any_norm_has_one_group() -> None:
    """What a partition holds need not be of both kinds."""
    config = run_config()
    weight = build(config.model).get_parameter(DECAYED)
    groups = make_optimizer(config, [(DECAYED, weight)]).param_groups
    assert [group["name"] for group in groups] == ["decay"]


@pytest.mark.parametrize("extra", [{}, {"l1": 0.1}])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_parameters_without_a_gradient_stay(name: str, extra: dict[str, float]) -> None:
    """Frozen ones, all of a group even: neither decay nor update, and no error."""
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
def test_states_made_ahead_are_those_a_step_makes(
    optimizer: dict[str, Any], names: tuple[str, ...]
) -> None:
    """And a first step from them is the first step from none."""
    config = run_config(optimizer=optimizer)
    assert {state_names(config, row) for row in arch.parameters(config.model)} == {names}
    ahead, eager = (setting(**optimizer) for _ in range(2))
    create_states(ahead[0])
    run(*ahead, [0.01, 0.01])
    run(*eager, [0.01, 0.01])
    for key in (DECAYED, FREE):
        assert torch.equal(ahead[1][key], eager[1][key])
        made = {k for k, v in eager[0].state[eager[1][key]].items() if v is not None}
        assert made == {*names, "step"} if "exp_avg" in names else made == set(names)
        assert set(ahead[0].state[ahead[1][key]]) == made or not names


def test_updates_are_counted_and_restored() -> None:
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
    """RMSProp with a correction of its bias: it counts updates and has no `exp_avg`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                state["step"] += 1
                state["square"].lerp_(parameter.grad.square(), 0.1)
                mean = state["square"] / (1 - 0.9 ** float(state["step"]))
                parameter.addcdiv_(parameter.grad, mean.sqrt() + 1e-8, value=-group["lr"])


def test_optimizer_without_adams_states_gets_its_count_of_updates_back(
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
def test_clipping(limit: float | None) -> None:
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
    """Unequal numbers of targets in the micro-batches: the mean is over all of them."""
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
        found = many.train_step(parts, divisor=divisor, lr=0.01, step=step)
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-6)
        assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-5)
    for ours, theirs in zip(many.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_a_step_clips_before_it_updates() -> None:
    """SGD without momentum or decay moves by lr x the clipped gradient."""
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
        start = make_model(trained.config.model)  # the same weights whatever the seed
        trained.model.load_state_dict(start.state_dict())
        batch = make_batch(trained.config.model)
        batch = type(batch)(batch.tensors, place, batch.targets)
        torch.manual_seed(place + 7)  # what came before does not matter
        return [
            float(trained.train_step([batch], divisor=1.0, lr=0.0, step=step).loss)
            for step in steps
        ]

    first = losses()
    assert first == losses()
    assert first[::-1] == losses(steps=(2, 1))
    different = {*first, *losses(seed=4), *losses(place=2)}
    assert len(different) == 6


def test_evaluation_is_without_dropout_or_gradient() -> None:
    trained = engine(model={"hidden_dropout": 0.3})
    batch = make_batch(trained.config.model)
    expected = make_model(trained.config.model, seed=trained.config.training.seed).eval()
    found = trained.eval_loss(batch)
    wanted = loss_of(expected, batch.tensors).item()
    assert found.item() == wanted == trained.eval_loss(batch).item()


def test_the_decay_column_of_the_table_is_what_groups_read() -> None:
    config = run_config(model={"norm": "layernorm", "mlp_bias": True, "activation": "relu"})
    for row in arch.parameters(config.model):
        assert row.decay == (len(arch.local_shape(row)) == 2), row.name


def test_the_norm_of_a_long_gradient_is_exact() -> None:
    """PyTorch's own sum over 16 million squares is off by 6e-4 on a CPU."""
    long = torch.randn(4_000_001, generator=torch.Generator().manual_seed(1)) * 1e-3
    found = total_norm([long, torch.ones(3, 2), torch.zeros(0)])
    exact = (long.double().square().sum() + 6).sqrt()
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-7)
