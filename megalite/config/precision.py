"""The number formats that a model is trained in."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Precision(str, enum.Enum):
    """Number format of weights and activations; the value is its name in a run file."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    __str__ = str.__str__  # print the value, in every version of Python

    @property
    def bytes(self) -> int:
        """Bytes of one number."""
        return 4 if self is Precision.FP32 else 2

    @property
    def torch(self) -> torch.dtype:
        """The format as a torch dtype. Only code that has imported torch already may use this."""
        import torch

        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return names[self.value]
