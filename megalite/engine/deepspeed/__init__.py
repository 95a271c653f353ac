"""The engine over DeepSpeed 0.19.8: the only package that imports DeepSpeed.

Import it before the ranks form groups. Default arguments of `deepspeed.comm` hold the group that
exists at import, with its threads and its port, until the process ends.
"""

from __future__ import annotations

import torch

from megalite import env

if not torch.cuda.is_available():
    env.set_default("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, with a warning

import deepspeed.comm  # noqa: F401
