"""Objectives: what a model is trained on, and by which number its loss is divided.

An objective counts its targets before a step, on the host, and returns summed losses in it. The
engine divides them by numbers of the whole global batch, so that no layout changes them. Those that
`objective.name` may request are registered as functions that make one from a run file. The fact
`architectures` names the networks that one is for; without it all are.

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

    total: the sum over the batch: fp32 scalar, with its gradient.
    per: what the sum over the global batch is divided by: the objective's count or the samples.
    """

    total: Tensor
    per: Literal["count", "samples"]


class LossTerms(NamedTuple):
    """The summed losses of a batch. Their means add up to what is minimised.

    total: the loss that is reported: fp32 scalar, nats; divided by the objective's count.
    extra: further terms, by name. They are reported separately.
    """

    total: Tensor
    extra: dict[str, ExtraTerm]


class Objective(Protocol):
    """A loss, and the number of targets that it is a sum over."""

    def count(self, batch: Mapping[str, npt.NDArray[Any]]) -> int:
        """Return the number of a batch's targets (tokens, frames, pairs), before the step."""

    def loss(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> LossTerms:
        """Return the summed losses of a batch; called inside the model's forward."""


class _MaskedTargets:
    """Targets that count if `loss_mask` says so: tokens, or one label a sample."""

    def count(self, batch: Mapping[str, npt.NDArray[Any]]) -> int:
        """Return the number of targets that count."""
        return int(np.count_nonzero(batch["loss_mask"]))


class TokenObjective(_MaskedTargets):
    """Cross entropy of tokens: the next ones, the hidden ones, or those that were cut out.

    Args:
        smoothing: the share of each target that is spread over the vocabulary, in training
            (Szegedy et al. 2015).
        compiled: whether what happens between the head's matrix products is compiled.
    """

    def __init__(self, *, smoothing: float = 0.0, compiled: bool = False) -> None:
        self._smoothing = smoothing
        self._compiled = compiled

    def loss(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> LossTerms:
        """Sum the cross entropy; see `LanguageModel.token_loss` for the batch."""
        total = model.token_loss(
            model.hidden(batch), batch, smoothing=self._smoothing, compiled=self._compiled
        )
        return LossTerms(total, {})


class LabelObjective(_MaskedTargets):
    """Cross entropy of one label a sample.

    Args:
        smoothing: the share of each target that is spread over the labels, in training.
        class_weights: the factor of each label's loss, in training. None means 1.
    """

    def __init__(
        self, *, smoothing: float = 0.0, class_weights: Sequence[float] | None = None
    ) -> None:
        self._smoothing = smoothing
        self._class_weights = class_weights
        self._weights: Tensor | None = None  # on the device of the scores

    def loss(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> LossTerms:
        """Sum the cross entropy over the samples with mask.

        Args:
            batch: see `LanguageModel.label_scores`; with labels int64 [B] and loss_mask bool [B].
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
        """Return the class weights next to the scores; copying them each time would sync a GPU."""
        if self._weights is None or self._weights.device != scores.device:
            self._weights = scores.new_tensor(self._class_weights)
        return self._weights


def plain_objective(model: ModelConfig) -> Objective:
    """Return the objective by which a model is measured: without smoothing or weights."""
    return LabelObjective() if model.num_labels else TokenObjective()


def make_objective(config: RunConfig) -> Objective:
    """Make the objective of a run file."""
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
