"""Engines, which run training steps on a model.

Both engines have the same interface and give the same numbers. `DeepSpeedEngine` trains.
`ReferenceEngine` is plain PyTorch on one device in fp32; tests compare `DeepSpeedEngine` with it.
Importing this package imports neither torch's distributed parts nor DeepSpeed.
"""

from megalite.engine.base import WEIGHT, Accept, Engine, StepResult, finite

__all__ = ["WEIGHT", "Accept", "Engine", "StepResult", "finite"]
