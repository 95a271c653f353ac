"""The engine over DeepSpeed 0.19.8: the only package that imports it.

It is imported before the ranks form groups. Default arguments of `deepspeed.comm` keep the group
that exists at that moment, for good, with its threads and its port.
"""

from __future__ import annotations

import torch

from megalite import env

if not torch.cuda.is_available():
    env.set_default("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess, and warn of its guess

import deepspeed.comm  # noqa: F401
