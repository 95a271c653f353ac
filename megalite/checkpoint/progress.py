"""The progress of a run that a checkpoint records."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Numbers of steps, samples and tokens.

    Attributes:
        step: optimizer steps taken.
        samples: position in the data order, including skipped samples.
        tokens: tokens seen, without padding.
        valid_loss: validation loss (nats) or evaluation score at this step; lower is better. None
            without an evaluation.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    valid_loss: float | None = field(default=None, compare=False)
