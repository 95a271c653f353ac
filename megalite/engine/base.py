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
    """The outcome of a step.

    Attributes:
        loss: this rank's part of the mean loss in nats. The loss is the sum over data-parallel
            ranks.
        grad_norm: norm of the global batch's gradient before clipping, equal on all ranks.
        extra: this rank's part of each further term of the objective, by name.
    """

    loss: Tensor
    grad_norm: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class StepLoss:
    """The mean loss of a step and the further terms of its objective, summed over micro-batches.

    Args:
        count: number of the objective's targets in the global batch.
        samples: number of samples in the global batch.
    """

    def __init__(self, device: torch.device, *, count: float, samples: int) -> None:
        self._divisors = {"count": count, "samples": float(samples)}
        self.loss = torch.zeros((), device=device)
        self.extra: dict[str, Tensor] = {}

    def add(self, terms: LossTerms) -> Tensor:
        """Add a micro-batch. Return its part of the minimised loss, for the backward."""
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
        """Prepare for a step. Return the accumulator for its micro-batches' losses."""
        self.wrapped.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        samples = self.config.training.global_batch_size
        return StepLoss(self.device, count=divisor, samples=samples)

    @torch.no_grad()
    def eval_loss(self, batch: Batch) -> Tensor:
        """Return the summed loss. See `Engine`."""
        self.wrapped.eval()
        terms: LossTerms = self.wrapped(self.objective.loss, batch.to(self.device).tensors)
        return terms.total

    @torch.no_grad()
    def eval_scores(self, batch: Batch) -> Tensor:
        """Return the logits. See `Engine`."""
        self.wrapped.eval()
        scores: Tensor = self.wrapped(last_scores, batch.to(self.device).tensors)
        return scores

    def close(self, *, failed: bool = False) -> None:
        """Discard compiled code, whose shapes would affect the compilation of a later run."""
        if self.config.training.compile:
            torch.compiler.reset()


class Engine(Protocol):
    """The interface of an engine.

    A state is a weight or an optimizer state in fp32. Under tensor parallelism it is this rank's
    part.
    """

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
        """Accumulate the batches' gradients, clip them, and update the model.

        Args:
            batches: this rank's micro-batches of the step.
            divisor: number of the objective's targets in the global batch, over all ranks.
            lr: learning rate of this step.
            step: number of the step, counted from 1. It seeds dropout.
            inspect: called between the backward and the update, when `read_gradient` works.
            accept: called before the update with this rank's part of the loss and the gradient's
                norm. If it returns false, the update is skipped. It must return the same on every
                rank.
        """

    def eval_loss(self, batch: Batch) -> Tensor:
        """Return the objective's summed loss without dropout or gradients: fp32 scalar, nats.

        It does not include further terms of the objective.
        """

    def eval_scores(self, batch: Batch) -> Tensor:
        """Return the logits of a batch without dropout or gradients.

        Returns:
            fp32 [B, C] of a classifier's labels, or [B, V] of the token after each text.
        """

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Return a context in which sharded parameters are whole."""

    def read_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return the whole of a parameter's state; a ZeRO group's collective."""

    def owner_rank(self, parameter: nn.Parameter) -> int | None:
        """Return the ZeRO rank that has all of a parameter's master weights and states.

        None means that several ranks have a part, or that each rank has all.
        """

    def read_local(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return `read_state` without communication. Only the parameter's owner rank may call this.

        The result may share memory with the engine.
        """

    def read_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole of a parameter's gradient before clipping; a ZeRO group's collective.

        It is the gradient of the global batch. Under fp16 it is that of the scaled loss.
        """

    def write_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set a parameter's state to a value that all ranks pass; a collective."""

    def group(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Return the hyper-parameters of a parameter's update."""

    def progress(self) -> dict[str, Any]:
        """Return the rest of the engine's state: the number of updates and the loss scale."""

    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        """Restore the state that `progress` returned."""

    def close(self, *, failed: bool = False) -> None:
        """Undo the engine's changes to the process. The engine cannot be used afterwards.

        Args:
            failed: whether another rank may have ended. If true, do not wait for the device.
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
    """Seed the generators of all devices by (seed, step, place in the data order).

    So dropout does not depend on the layout, and a resumed run repeats it.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + place * 0x94D049BB133111EB) % (
        1 << 63
    )
    torch.manual_seed(mixed)  # seeds the CPU and all GPUs
