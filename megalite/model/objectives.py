"""Objectives: the loss of a batch, and the number of targets that the loss is divided by.

An objective counts its targets before a step, on the host. During the step it returns summed
losses. The engine divides them by counts of the whole global batch, so no layout changes the
result. For each value of `objective.name`, a function that makes the objective from a run file is
registered. The fact `architectures` lists the architectures that the objective supports. Without
this fact it supports all.

B samples   T tokens   C labels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from megalite import registry
from megalite.config import ModelConfig, RunConfig
from megalite.model.transformer import LanguageModel


class ExtraTerm(NamedTuple):
    """A further term of a loss.

    Attributes:
        total: sum over the batch: fp32 scalar, with its gradient.
        per: divisor of the sum over the global batch: the objective's count, or the samples.
    """

    total: Tensor
    per: Literal["count", "samples"]


class LossTerms(NamedTuple):
    """The summed losses of a batch. The sum of their means is minimised.

    Attributes:
        total: the reported loss, summed: fp32 scalar, nats. Its divisor is the objective's count.
        extra: further terms by name, which are reported separately.
    """

    total: Tensor
    extra: dict[str, ExtraTerm]


class Objective(Protocol):
    """A loss, and the number of targets that the loss is summed over."""

    def count(self, batch: Mapping[str, npt.NDArray[Any]]) -> int:
        """Return the number of a batch's targets (tokens, frames, pairs). Called before a step."""

    def loss(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> LossTerms:
        """Return the summed losses of a batch. Called inside the model's forward."""


class _MaskedTargets:
    """Targets with a `loss_mask`: tokens, or one label per sample."""

    def count(self, batch: Mapping[str, npt.NDArray[Any]]) -> int:
        """Return the number of targets that count."""
        return int(np.count_nonzero(batch["loss_mask"]))


class TokenObjective(_MaskedTargets):
    """Cross entropy of tokens: next tokens, masked tokens, or removed spans.

    Args:
        smoothing: share of each target that is spread over the vocabulary in training (Szegedy et
            al. 2015).
        compiled: whether to compile the operations between the head's matrix products.
    """

    def __init__(self, *, smoothing: float = 0.0, compiled: bool = False) -> None:
        self._smoothing = smoothing
        self._compiled = compiled

    def loss(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> LossTerms:
        """Return the summed cross entropy. See `LanguageModel.token_loss` for the batch."""
        total = model.token_loss(
            model.hidden(batch), batch, smoothing=self._smoothing, compiled=self._compiled
        )
        return LossTerms(total, {})


class LabelObjective(_MaskedTargets):
    """Cross entropy of one label per sample.

    Args:
        smoothing: share of each target that is spread over the labels in training.
        class_weights: factor of each label's loss in training. None means 1.
    """

    def __init__(
        self, *, smoothing: float = 0.0, class_weights: Sequence[float] | None = None
    ) -> None:
        self._smoothing = smoothing
        self._class_weights = class_weights
        self._weights: Tensor | None = None  # on the device of the scores

    def loss(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> LossTerms:
        """Return the cross entropy, summed over the samples whose mask is true.

        Args:
            batch: see `LanguageModel.label_scores`. Also contains labels int64 [B] and loss_mask
                bool [B].
        """
        scores_BC = model.label_scores(batch)
        weights = None
        smoothing = 0.0
        if model.training:
            smoothing = self._smoothing
            if self._class_weights:
                weights = self._weights_like(scores_BC)
        losses_B = F.cross_entropy(
            scores_BC, batch["labels"], weight=weights, label_smoothing=smoothing, reduction="none"
        )
        return LossTerms((losses_B * batch["loss_mask"]).sum(), {})

    def _weights_like(self, scores: Tensor) -> Tensor:
        """Return the class weights on the scores' device.

        They are kept there, because a copy in each step would synchronise a GPU.
        """
        if self._weights is None or self._weights.device != scores.device:
            self._weights = scores.new_tensor(self._class_weights)
        return self._weights


def plain_objective(model: ModelConfig) -> Objective:
    """Return the objective for evaluation: without smoothing or class weights."""
    return LabelObjective() if model.num_labels else TokenObjective()


def make_objective(config: RunConfig) -> Objective:
    """Return the objective of a run file."""
    if config.model.num_labels:
        return _make_labels(config)
    objective: Objective = registry.objectives.load(config.objective.name)(config)
    return objective


@registry.objectives.register("causal", architectures=("decoder",))
@registry.objectives.register("masked", architectures=("encoder",))
@registry.objectives.register("span_corruption", architectures=("encoder_decoder",))
def _make_tokens(config: RunConfig) -> Objective:
    smoothing = config.finetune.label_smoothing if config.finetune else 0.0
    return TokenObjective(smoothing=smoothing, compiled=config.training.compile)


def _make_labels(config: RunConfig) -> Objective:
    if config.finetune is None:
        return LabelObjective()
    return LabelObjective(
        smoothing=config.finetune.label_smoothing, class_weights=config.finetune.class_weights
    )
