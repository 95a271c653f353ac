"""Checkpoints: saved as named tensors, published by one rename, found and checked on resume."""

from megalite.checkpoint.lease import Lease
from megalite.checkpoint.load import (
    fill_model,
    find_newest,
    load_weights,
    open_checkpoint,
    refuse_other_model,
    restore,
    set_aside_damaged,
)
from megalite.checkpoint.save import Place, Saver, clear_leftovers, retain, set_aside_later

__all__ = [
    "Lease",
    "Place",
    "Saver",
    "clear_leftovers",
    "fill_model",
    "find_newest",
    "load_weights",
    "open_checkpoint",
    "refuse_other_model",
    "restore",
    "retain",
    "set_aside_damaged",
    "set_aside_later",
]
