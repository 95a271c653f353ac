"""Imports what a run imports late, for a process on a CPU whose forks then begin at once."""

from __future__ import annotations

from megalite import env

env.set_default("DS_ACCELERATOR", "cpu")
env.set_default("OMP_NUM_THREADS", "1")

import torch._dynamo  # noqa: E402
import torch._inductor.compile_fx  # noqa: E402, F401

import megalite.engine.deepspeed.engine  # noqa: E402, F401
