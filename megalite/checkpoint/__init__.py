"""Checkpoints: saved as named tensors, published by one rename, found and checked on resume."""

from megalite.checkpoint.lease import Lease
from megalite.checkpoint.load import find_newest, load_weights, open_checkpoint, restore
from megalite.checkpoint.save import Place, retain, save

__all__ = [
    "Lease",
    "Place",
    "find_newest",
    "load_weights",
    "open_checkpoint",
    "restore",
    "retain",
    "save",
]
