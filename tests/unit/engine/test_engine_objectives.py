# covers: megalite/model/objectives.py megalite/engine/base.py
"""Objectives with further terms, and with targets other than tokens, train in every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.config import Precision
from megalite.data import Batch
from megalite.engine import StepResult
from megalite.engine.reference import ReferenceEngine
from megalite.env import Launch
from megalite.model import ExtraTerm, LanguageModel, LossTerms, make_objective
from megalite.model.objectives import LabelObjective, TokenObjective
from tests.helpers.models import SINGLE_RANK, make_batch, make_model, model_config, run_config
from tests.helpers.ranks import run_ranks

STEPS, SAMPLES, MICRO, LENGTH = 3, 4, 2, 8


class Penalized:
    """Next tokens, and two penalties on hidden states: per sample and per target."""

    def count(self, batch: Mapping[str, Any]) -> int:
        return int(np.count_nonzero(batch["loss_mask"]))

    def loss(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> LossTerms:
        hidden_BTD = model.hidden(batch)
        squares_BT = hidden_BTD.float().square().mean(dim=-1)
        return LossTerms(
            model.token_loss(hidden_BTD, batch),
            {
                "of_samples": ExtraTerm(0.1 * squares_BT.mean(dim=1).sum(), "samples"),
                "of_tokens": ExtraTerm(0.2 * (squares_BT * batch["loss_mask"]).sum(), "count"),
            },
        )


class Frames:
    """Regression of each frame's loudness: the targets are frames, not tokens."""

    def count(self, batch: Mapping[str, Any]) -> int:
        return int(batch["frames"].sum())

    def loss(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> LossTerms:
        hidden_BTD = model.hidden(batch)
        frames_BT = torch.arange(LENGTH, device=hidden_BTD.device) < batch["frames"][:, None]
        errors_BT = (hidden_BTD.float().mean(dim=-1) - batch["loudness"]).square()
        return LossTerms((errors_BT * frames_BT).sum(), {})


OBJECTIVES = {"penalized": Penalized, "frames": Frames}


def micro_batches(step: int) -> list[Batch]:
    """Return the micro-batches of a step, in the order of samples."""
    config = model_config()
    batches = []
    for number in range(SAMPLES // MICRO):
        batch = make_batch(config, samples=MICRO, length=LENGTH, seed=10 * step + number)
        generator = torch.Generator().manual_seed(batch.place)
        batch.tensors["frames"] = torch.randint(1, LENGTH, (MICRO,), generator=generator)
        batch.tensors["loudness"] = torch.randn(MICRO, LENGTH, generator=generator)
        batches.append(batch)
    return batches


def sections(**others: Any) -> dict[str, Any]:
    # tied embeddings: every parameter has a gradient, although frames use no head
    return {"model": {"tie_word_embeddings": True}, "training": {"steps": STEPS}, **others}


def train(engine: Any, local: Sequence[slice]) -> list[dict[str, float]]:
    """Train on the micro-batches of `local`. Return loss, extra terms and norm of each step."""
    curve = []
    for step in range(1, STEPS + 1):
        batches = micro_batches(step)
        counts = [batch.with_targets(engine.objective.count).targets for batch in batches]
        local_batches = [batch for part in local for batch in batches[part]]
        result: StepResult = engine.train_step(
            local_batches, divisor=sum(counts), lr=0.01, step=step
        )
        terms = {"loss": result.loss, **result.extra}
        curve.append({name: float(term) for name, term in terms.items()})
        curve[-1]["norm"] = float(result.grad_norm)
    return curve


def train_rank(launch: Launch, name: str, stage: int, tensor: int) -> list[dict[str, float]]:
    """Train with the DeepSpeed engine. Return this rank's loss, extra terms and norms."""
    from megalite.engine.deepspeed import settings as deepspeed_settings
    from megalite.engine.deepspeed.engine import DeepSpeedEngine
    from megalite.parallel import start

    grid = start(launch, tensor=tensor)
    data = launch.world_size // tensor
    settings = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": SAMPLES // MICRO // data,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 1.0,
    }
    engine = DeepSpeedEngine(
        run_config(**sections(parallel={"tensor": tensor})),
        grid=grid,
        precision=Precision.FP32,
        settings=deepspeed_settings.fill_defaults(settings, grid),
        objective=OBJECTIVES[name](),
    )
    return train(engine, [slice(grid.at.data_rank, None, data)])


@pytest.mark.parametrize(
    ("name", "stage", "tensor"),
    [("penalized", 1, 1), ("penalized", 3, 1), ("penalized", 1, 2), ("frames", 1, 1)],
)
def test_objective_gives_equal_losses_and_norms_in_every_engine(
    name: str, stage: int, tensor: int
) -> None:
    objective = OBJECTIVES[name]()
    reference = ReferenceEngine(run_config(**sections()), grid=SINGLE_RANK, objective=objective)
    expected = train(reference, [slice(None)])
    ranks = run_ranks(train_rank, 2, name, stage, tensor)
    for step, terms in enumerate(expected):
        for term, value in terms.items():
            parts = [rank[step][term] for rank in ranks]
            # tensor ranks have the same terms; data ranks have parts of the sum
            total = parts[0] if tensor == 2 or term == "norm" else sum(parts)
            assert total == pytest.approx(value, rel=2e-6), (step, term)
    assert expected[0]["loss"] != expected[-1]["loss"]
    assert {"of_samples", "of_tokens"} <= expected[0].keys() or name == "frames"


def test_reference_engine_divides_each_term_by_its_count() -> None:
    """The gradient is that of an explicit sum of loss / targets and each term / its count."""
    engine = ReferenceEngine(run_config(**sections()), grid=SINGLE_RANK, objective=Penalized())
    plain = make_model(engine.config.model, seed=engine.config.training.seed)
    batches = micro_batches(1)
    targets = sum(batch.targets for batch in batches)
    loss = torch.zeros(())
    for batch in batches:
        terms = Penalized().loss(plain, batch.tensors)
        per_sample, per_token = terms.extra["of_samples"].total, terms.extra["of_tokens"].total
        loss = loss + (terms.total + per_token) / targets + per_sample / SAMPLES
    loss.backward()
    squares = [p.grad.square().sum() for p in plain.parameters() if p.grad is not None]
    result = engine.train_step(batches, divisor=targets, lr=0.01, step=1)
    assert float(result.grad_norm) == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)
    whole = float(result.loss) + sum(float(term) for term in result.extra.values())
    assert whole == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_label_objective_smooths_and_weighs_only_in_training(training: bool) -> None:
    config = model_config(num_labels=3, classifier_pooling="last")
    model = make_model(config, spread=0.3).train(training)
    tensors = dict(make_batch(config).tensors)
    tensors["labels"] = torch.tensor([2, 0])
    tensors["loss_mask"] = torch.tensor([True, False])
    tensors["lengths"] = torch.tensor([8, 5])
    objective = LabelObjective(smoothing=0.1, class_weights=(1.0, 2.0, 0.5))
    scores = model.label_scores(tensors)[:1]
    weight = torch.tensor([1.0, 2.0, 0.5]) if training else None
    smoothing = 0.1 if training else 0.0
    expected = F.cross_entropy(
        scores, torch.tensor([2]), weight=weight, label_smoothing=smoothing, reduction="sum"
    )
    assert objective.loss(model, tensors).total.item() == pytest.approx(expected.item())
    assert objective.count({"loss_mask": tensors["loss_mask"].numpy()}) == 1


def test_objective_follows_from_the_run_file() -> None:
    assert isinstance(make_objective(run_config()), TokenObjective)
    labels = {"num_labels": 3, "classifier_pooling": "last"}
    assert isinstance(make_objective(run_config(model=labels)), LabelObjective)
