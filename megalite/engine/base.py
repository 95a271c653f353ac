"""The interface of engines: a step, an evaluation, and state one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megalite import arch
from megalite.config import ModelConfig, RunConfig
from megalite.data import Batch
from megalite.formats.checkpoint import WEIGHT
from megalite.model import LanguageModel, LossTerms, Objective, last_scores

__all__ = [
    "WEIGHT",
    "Accept",
    "Engine",
    "EngineBase",
    "StepLoss",
    "StepResult",
    "finite",
    "freeze",
    "has_dropout",
    "seed_dropout",
]

Accept = Callable[[Tensor, Tensor], bool]


def finite(_loss: Tensor, norm: Tensor) -> bool:
    """Accept an update unless the gradient's norm is not finite."""
    return math.isfinite(norm)


@dataclass(frozen=True)
class StepResult:
    """One step's outcome.

    loss: this rank's part of the mean loss (nats). The sum over data-parallel ranks is the loss.
    grad_norm: the norm of the global batch's gradient before clipping, equal on all ranks.
    extra: this rank's part of each further term of the objective, by name, as `loss`.
    """

    loss: Tensor
    grad_norm: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class StepLoss:
    """The mean loss of a step and the further terms of its objective, summed over micro-batches.

    Args:
        count: the objective's count of targets in the global batch.
        samples: the number of samples in the global batch.
    """

    def __init__(self, device: torch.device, *, count: float, samples: int) -> None:
        self._divisors = {"count": count, "samples": float(samples)}
        self.loss = torch.zeros((), device=device)
        self.extra: dict[str, Tensor] = {}

    def add(self, terms: LossTerms) -> Tensor:
        """Add a micro-batch; return the scalar whose gradient is the micro-batch's part."""
        mean = terms.total / self._divisors["count"]
        self.loss += mean.detach()
        for name, term in terms.extra.items():
            part = term.total / self._divisors[term.per]
            mean = mean + part
            self.extra[name] = self.extra.get(name, torch.zeros_like(self.loss)) + part.detach()
        return mean


class EngineBase:
    """Operations that all engines share, around the wrapped model.

    Attributes:
        wrapped: the module whose forward runs the model.
    """

    config: RunConfig
    device: torch.device
    objective: Objective
    optimizer: Any
    wrapped: Any

    def begin_step(self, *, divisor: float, lr: float) -> StepLoss:
        """Prepare for the micro-batches of a step; return the sum of their losses."""
        self.wrapped.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        samples = self.config.training.global_batch_size
        return StepLoss(self.device, count=divisor, samples=samples)

    @torch.no_grad()
    def eval_loss(self, batch: Batch) -> Tensor:
        """Return the summed loss; see `Engine`."""
        self.wrapped.eval()
        terms: LossTerms = self.wrapped(self.objective.loss, batch.to(self.device).tensors)
        return terms.total

    @torch.no_grad()
    def eval_scores(self, batch: Batch) -> Tensor:
        """Return the logits; see `Engine`."""
        self.wrapped.eval()
        scores: Tensor = self.wrapped(last_scores, batch.to(self.device).tensors)
        return scores

    def close(self, *, failed: bool = False) -> None:
        """Forget compiled code, whose shapes would decide how a later run is compiled."""
        if self.config.training.compile:
            torch.compiler.reset()


class Engine(Protocol):
    """The interface of an engine. States are fp32 and, under tensor parallelism, the rank's."""

    model: LanguageModel
    objective: Objective

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
            divisor: the objective's count of the global batch, over all ranks and micro-batches.
            lr: the learning rate of this step.
            step: the step's number, counted from 1; seeds dropout.
            inspect: called between the backward and the update, where `read_gradient` works.
            accept: asked before the update with this rank's part of the loss and the gradient's
                norm; what it refuses is omitted. It must say the same on every rank.
        """

    def eval_loss(self, batch: Batch) -> Tensor:
        """Return the objective's summed loss without dropout or gradients: fp32 scalar, nats.

        Further terms of the objective are omitted.
        """

    def eval_scores(self, batch: Batch) -> Tensor:
        """Return the logits of a batch without dropout or gradients.

        Returns:
            fp32 [B, C] of a classifier's labels, or [B, V] of the token after each text.
        """

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Return a context in which parameters that the engine keeps in parts are whole."""

    def read_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return one state of one parameter, whole; a collective of ZeRO's group."""

    def owner_rank(self, parameter: nn.Parameter) -> int | None:
        """Return the ZeRO rank that alone has a parameter's master and states, complete.

        None means that several ranks have a part, or that each rank has all.
        """

    def read_local(self, parameter: nn.Parameter, key: str) -> Tensor:
        """`read_state` on the ranks of `owner_rank` only; may share memory with the engine."""

    def read_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return the global batch's gradient of one parameter, whole, before clipping.

        A collective as `read_state` is. Under fp16 it is the gradient of the scaled loss.
        """

    def write_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set one state of one parameter; a collective, with the same value on every rank."""

    def group(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Return the hyper-parameters that a parameter is updated with."""

    def progress(self) -> dict[str, Any]:
        """Return the number of updates and the loss scale: the rest of the engine's state."""

    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        """Set what `progress` returned."""

    def close(self, *, failed: bool = False) -> None:
        """Leave the process as it was before the engine, which cannot be used any more.

        Args:
            failed: whether another rank may be lost, so that nothing may wait for the device.
        """


def freeze(model: LanguageModel, config: RunConfig) -> None:
    """Freeze the parameters that a run file does not train."""
    for row in arch.parameters(config.model):
        model.get_parameter(row.name).requires_grad_(arch.is_trainable(config, row))


def has_dropout(model: ModelConfig) -> bool:
    """Return whether a forward draws random numbers."""
    adapters = model.adapter.dropout if model.adapter else 0.0
    return bool(model.hidden_dropout or model.attention_dropout or adapters)


def seed_dropout(seed: int, step: int, place: int) -> None:
    """Seed every generator from (seed, step, place in the data order): randomness is a function."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + place * 0x94D049BB133111EB) % (
        1 << 63
    )
    torch.manual_seed(mixed)  # the CPU's generator and every GPU's
