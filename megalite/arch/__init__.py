"""The parts of a model: each parameter's name, shape, split and initial values, and all costs."""

from megalite.arch.ends import chunk_rows, padded_targets
from megalite.arch.network import (
    base_model,
    is_trainable,
    is_trainable_under,
    layer_types,
    layer_windows,
    lengths,
    network,
    parameters,
    stacks,
    tensors,
)
from megalite.arch.table import (
    CanonicalTensor,
    Init,
    ParameterSpec,
    Piece,
    Split,
    local_shape,
    needs_tp_grad_sum,
    pieces,
)

__all__ = [
    "CanonicalTensor",
    "Init",
    "ParameterSpec",
    "Piece",
    "Split",
    "base_model",
    "chunk_rows",
    "is_trainable",
    "is_trainable_under",
    "layer_types",
    "layer_windows",
    "lengths",
    "local_shape",
    "needs_tp_grad_sum",
    "network",
    "padded_targets",
    "parameters",
    "pieces",
    "stacks",
    "tensors",
]
