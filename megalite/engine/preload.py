"""Imports what a run imports late, for a process on a CPU whose forks then begin at once."""

from __future__ import annotations

from megalite import env

env.set_default("DS_ACCELERATOR", "cpu")
env.set_default("OMP_NUM_THREADS", "1")

import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401  compiles, so imports a compiler
import torch._dynamo  # noqa: E402
import torch._inductor.compile_fx  # noqa: E402, F401

import megalite.engine.zero  # noqa: E402, F401
