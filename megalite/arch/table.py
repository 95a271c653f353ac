"""The name, shape, split and initial values of a parameter.

A weight has two forms. On disk it is a *canonical tensor*: Hugging Face's (Llama's) name, not
fused, [out, in], vocabulary not padded. In memory it is part of a *parameter*: q, k and v are
stacked along dim 0 into one matrix, gate and up into another. Each rank of a tensor-parallel group
holds a slice. `pieces` maps one form to the other. Layers, initialisation, checkpoints, export and
the planner all use these specifications.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megalite.mesh import WHOLE, Coordinate

Shape = tuple[int, ...]


class Split(enum.Enum):
    """The way tensor-parallel ranks share a canonical [out, in] (or [out]) tensor.

    OUTPUT_DIM is the split of Megatron's column-parallel layers, INPUT_DIM that of its row-parallel
    layers (Shoeybi et al. 2019).
    """

    REPLICATED = "each rank holds all of it"
    OUTPUT_DIM = "dim 0, in equal parts"
    INPUT_DIM = "dim 1, in equal parts"
    VOCABULARY = "dim 0, padded to equal parts"
    HEADS = "dim 0, in equal parts of whole heads"


class Init(enum.Enum):
    """The initial value of an element; the standard deviation is `initializer_range`."""

    NORMAL = "normal"
    ADAPTER = "normal, 1 / sqrt(3 x inputs): the variance of a uniform Kaiming start"
    SCALED_NORMAL = "normal, over sqrt(2 x layers): the last matrix of a residual branch"
    ONES = "ones"
    ZEROS = "zeros"


class Sees(enum.Enum):
    """The inputs that a rank's copy of a replicated parameter is multiplied with."""

    EVERYTHING = "all tokens and heads"
    OWN_TOKENS = "the rank's own tokens, under sequence parallelism"
    OWN_HEADS = "the rank's own heads"


@dataclass(frozen=True)
class CanonicalTensor:
    """A tensor of a checkpoint and of a Hugging Face folder."""

    name: str
    shape: Shape
    split: Split

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the model in memory; several tensors are stacked along dim 0.

    Attributes:
        decay: whether weight decay applies: true for matrices, false for norms and biases.
        sees: inputs of a replicated parameter, which decide whether its gradients are summed.
        block: name of the parameter's block; empty outside of the blocks.
        is_adapter: whether the parameter is a LoRA matrix.
        is_label_head: whether the parameter is a classifier's head, which trains with adapters.
    """

    name: str
    tensors: tuple[CanonicalTensor, ...]
    init: Init
    decay: bool
    sees: Sees = Sees.EVERYTHING
    block: str = ""
    is_adapter: bool = False
    is_label_head: bool = False

    @property
    def elements(self) -> int:
        """Return the elements of the whole parameter, unpadded, over all tensor ranks."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def is_matrix_of_block(self) -> bool:
        """Return whether the parameter is a weight of a block's matrix products."""
        return self.decay and bool(self.block) and not self.is_adapter


@dataclass(frozen=True)
class Piece:
    """A slice `source` of a canonical tensor, which is the slice `target` of a parameter."""

    tensor: CanonicalTensor
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def specify(
    name: str,
    shapes: Shape | Mapping[str, Shape],
    split: Split = Split.REPLICATED,
    init: Init | None = None,
    *,
    sees: Sees = Sees.EVERYTHING,
) -> ParameterSpec:
    """Return the specification of a parameter.

    Args:
        name: dotted name, which ends in a module and the kind ("weight" or "bias").
        shapes: shape of the only tensor, or the shapes of fused tensors by their modules' names.
        init: None means NORMAL for matrices and ZEROS for vectors.
    """
    *owner, module, kind = name.split(".")
    parts = shapes if isinstance(shapes, Mapping) else {module: shapes}
    tensors = tuple(
        CanonicalTensor(".".join((*owner, part, kind)), shape, split)
        for part, shape in parts.items()
    )
    is_matrix = len(tensors[0].shape) > 1
    first = init or (Init.NORMAL if is_matrix else Init.ZEROS)
    return ParameterSpec(name, tensors, first, decay=is_matrix, sees=sees)


def local_shape(spec: ParameterSpec, at: Coordinate = WHOLE) -> Shape:
    """Return the shape of a parameter on a rank, padding included."""
    shapes = [_local(tensor, at.mesh.tensor) for tensor in spec.tensors]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def pieces(spec: ParameterSpec, at: Coordinate = WHOLE) -> tuple[Piece, ...]:
    """Return the slices of canonical tensors that a rank's parameter consists of.

    Elements that no piece covers are vocabulary padding and must be zero.
    """
    return tuple(_pieces(spec, at.mesh.tensor, at.tensor_rank))


def needs_tp_grad_sum(spec: ParameterSpec, *, sequence: bool) -> bool:
    """Return whether the tensor ranks must sum a parameter's gradients.

    This holds for replicated parameters if each rank sees a part of the tokens or heads.

    Args:
        sequence: whether the run uses sequence parallelism.
    """
    if spec.tensors[0].split is not Split.REPLICATED:
        return False
    return spec.sees is Sees.OWN_HEADS or (sequence and spec.sees is Sees.OWN_TOKENS)


def _local(tensor: CanonicalTensor, ranks: int) -> Shape:
    shape = list(tensor.shape)
    if tensor.split is Split.VOCABULARY:
        shape[0] = -(-shape[0] // ranks)
    elif tensor.split is not Split.REPLICATED:
        dim = 1 if tensor.split is Split.INPUT_DIM else 0
        assert shape[dim] % ranks == 0, f"{tensor} over {ranks} ranks"
        shape[dim] //= ranks
    return tuple(shape)


def _pieces(spec: ParameterSpec, ranks: int, rank: int) -> Iterator[Piece]:
    assert 0 <= rank < ranks
    offset = 0
    for tensor in spec.tensors:
        local = _local(tensor, ranks)
        dim = 1 if tensor.split is Split.INPUT_DIM else 0
        start = 0 if tensor.split is Split.REPLICATED else rank * local[dim]
        size = min(local[dim], tensor.shape[dim] - start)
        if size > 0:
            source = [slice(0, length) for length in tensor.shape]
            source[dim] = slice(start, start + size)
            target = [slice(0, box.stop - box.start) for box in source]
            target[0] = slice(offset + target[0].start, offset + target[0].stop)
            yield Piece(tensor, tuple(source), tuple(target))
        offset += local[0]
