"""Engines: what turns micro-batches into an updated model.

Both engines take the same calls and give the same numbers. `DeepSpeedEngine` trains;
`ReferenceEngine` is plain PyTorch on one device in fp32, the oracle it is compared with.
Importing this package imports neither torch's distributed parts nor DeepSpeed.
"""

from megalite.engine.base import WEIGHT, Accept, Engine, StepResult, finite

__all__ = ["WEIGHT", "Accept", "Engine", "StepResult", "finite"]
