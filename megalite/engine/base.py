"""What every engine offers: a step, an evaluation, and its state one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megalite import arch
from megalite.config import ModelConfig, RunConfig
from megalite.data import Batch
from megalite.formats.checkpoint import WEIGHT
from megalite.model import LanguageModel, head_loss

__all__ = [
    "WEIGHT",
    "Accept",
    "Engine",
    "StepResult",
    "finite",
    "has_dropout",
    "seed_dropout",
    "tune",
]

Accept = Callable[[Tensor, Tensor], bool]


def finite(_loss: Tensor, norm: Tensor) -> bool:
    """Accepts an update unless the gradient's norm is not finite."""
    return math.isfinite(norm)


@dataclass(frozen=True)
class StepResult:
    """One step's outcome.

    loss: this rank's part of the mean loss (nats); the sum over data-parallel ranks is the loss.
    grad_norm: of the global batch's gradient before clipping, equal on all ranks.
    """

    loss: Tensor
    grad_norm: Tensor


class Engine(Protocol):
    """The interface of an engine. States are fp32 and, under tensor parallelism, the rank's."""

    model: LanguageModel

    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        divisor: float,
        lr: float,
        step: int,
        inspect: Callable[[], None] | None = None,
        accept: Accept = finite,
    ) -> StepResult:
        """Accumulate the batches' gradients, clip, and update.

        Args:
            batches: this rank's micro-batches of the step.
            divisor: unmasked targets of the global batch, over all ranks and micro-batches.
            lr: the learning rate of this step.
            step: the step's number, counted from 1; seeds dropout.
            inspect: called between the backward and the update, where `read_gradient` works.
            accept: asked before the update with this rank's part of the loss and the gradient's
                norm; what it refuses is left out. It must say the same on every rank.
        """

    def eval_loss(self, batch: Batch) -> Tensor:
        """Summed loss of a batch without dropout or gradients: fp32 scalar, nats."""

    def eval_scores(self, batch: Batch) -> Tensor:
        """Logits of a batch, without dropout or gradients: fp32 [B, C] of a classifier's labels,
        else [B, V] of the token after each text."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """A context in which parameters the engine keeps in parts are whole (for generation)."""

    def read_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """One state of one parameter, whole; a collective of the data-parallel group."""

    def owner_rank(self, parameter: nn.Parameter) -> int | None:
        """Return the ZeRO rank that alone has a parameter's master and states, complete.

        None means that several ranks have a part, or that each rank has all.
        """

    def read_local(self, parameter: nn.Parameter, key: str) -> Tensor:
        """`read_state` on the ranks of `owner_rank` only; may share memory with the engine."""

    def read_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The global batch's gradient of one parameter, whole, before clipping; as `read_state`.

        Under fp16 it is the scaled loss's.
        """

    def write_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set one state of one parameter; a collective, with the same value on every rank."""

    def group(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """The hyper-parameters that a parameter is updated with."""

    def progress(self) -> dict[str, Any]:
        """Updates taken and the loss scale: plain numbers, the rest of the engine's state."""

    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        """Set what `progress` gave."""


def tune(model: LanguageModel, config: RunConfig) -> Callable[..., Tensor]:
    """Freeze what a run file does not train, set what its loss is like; returns the head's loss."""
    for row in arch.parameters(config.model):
        model.get_parameter(row.name).requires_grad_(arch.is_trainable(config, row))
    tuning, smoothing = config.finetune, 0.0
    if tuning is not None and config.model.num_labels:
        model.score.label_smoothing = tuning.label_smoothing
        if tuning.class_weights:
            device = model.score.weight.device
            model.score.class_weights = torch.tensor(tuning.class_weights, device=device)
    elif tuning is not None:
        smoothing = tuning.label_smoothing
    return partial(head_loss, compiled=config.training.compile, smoothing=smoothing)


def has_dropout(model: ModelConfig) -> bool:
    """Whether a forward draws random numbers."""
    adapters = model.adapter.dropout if model.adapter else 0.0
    return bool(model.hidden_dropout or model.attention_dropout or adapters)


def seed_dropout(seed: int, step: int, place: int) -> None:
    """Seed every generator from (seed, step, place in the data order): randomness is a function."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + place * 0x94D049BB133111EB) % (
        1 << 63
    )
    torch.manual_seed(mixed)  # the CPU's generator and every GPU's
