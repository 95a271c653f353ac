"""Early imports of slow modules, so that forks of this process start a run at once."""

from __future__ import annotations

from megalite import env

env.set_default("DS_ACCELERATOR", "cpu")
env.set_default("OMP_NUM_THREADS", "1")

import torch._dynamo  # noqa: E402, F401
import torch._inductor.compile_fx  # noqa: E402, F401

import megalite.engine.deepspeed.engine  # noqa: E402, F401
