"""Imported once by the server that the ranks of a test are forked from."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: F401

import megalite.engine.zero  # noqa: F401
