"""Progress of a run, as a checkpoint records it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Steps taken, samples of the data order consumed, and tokens seen.

    Attributes:
        step: optimizer steps taken.
        samples: position in the data order. Samples that were omitted count, too.
        tokens: tokens seen, without padding.
        valid_loss: score of the evaluation at this very step, lower is better: in nats if it is a
            validation loss. None without an evaluation.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    valid_loss: float | None = field(default=None, compare=False)
