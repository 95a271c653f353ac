"""How a parameter is named, shaped, split and initialised.

One weight has two views. On disk it is a *canonical tensor*: Hugging Face's (Llama's) name, not
fused, [out, in], vocabulary not padded. In memory it is part of a *parameter*: q, k and v are
stacked along dim 0 into one matrix, gate and up into another, and each rank of a tensor-parallel
group holds a slice. `pieces` maps one to the other. Layers, initialisation, checkpoints, export
and the planner all read these specifications.
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

    Splitting the output dimension is Megatron's column-parallel layer, the input dimension its
    row-parallel one (Shoeybi et al. 2019).
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
    SCALED_NORMAL = "normal, over sqrt(2 x layers): what ends a residual branch"
    ONES = "ones"
    ZEROS = "zeros"


class Sees(enum.Enum):
    """Input of a replicated parameter's product on each rank."""

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
        """Return how many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the model in memory; several tensors are stacked along dim 0.

    Attributes:
        decay: whether weight decay applies; it does to matrices, not to norms and biases.
        sees: inputs of a replicated parameter, which decide whether its gradients are summed.
        block: name of the block it belongs to; empty outside of the blocks.
        is_adapter: whether it is one of the two LoRA matrices next to a weight.
        is_label_head: whether it is a classifier's head, which trains along with adapters.
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
        """Return whether it is a weight of a block's matrix products."""
        return self.decay and bool(self.block) and not self.is_adapter


@dataclass(frozen=True)
class Piece:
    """The box `source` of a canonical tensor, which lies at the box `target` of a parameter."""

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
        shapes: shape of its only tensor, or the shapes of several fused ones by their modules.
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
    """Return which boxes of which canonical tensors a rank's parameter consists of.

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
