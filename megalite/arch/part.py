"""The interface of a model's parts: parameters, cost, and gradients.

A part is a pair of files with one name: here what it is (its parameters and costs, without torch),
under `megalite/model` what it computes.

B samples of a micro-batch   T tokens of a sample   S tokens of the text that is read
V vocabulary   C labels   P positions   Y segment types   D width   F width inside the MLP
N query heads   K key/value heads   H head width   Q = N x H
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megalite.arch.table import ParameterSpec
from megalite.config import ModelConfig

MessageKind = Literal["all_reduce", "all_gather", "reduce_scatter"]
Pair = tuple[float, float]  # of the forward and of the backward


@dataclass(frozen=True)
class Workload:
    """One rank's input to the parts of a stack in a micro-batch, and its numerics.

    Attributes:
        samples: B. tokens: T. memory_tokens: S, or 0.
        tensor: ranks that share each matrix. sequence: whether they share the tokens as well.
        recompute: whether the backward computes a block's forward again.
        compiled: whether blocks are compiled. eager_cpu: whether PyTorch's own CPU kernels run.
        cpu: whether the device is a CPU.
        sample_masks: whether each sample has a mask of its own, for documents or padding.
        document_tokens: mean length of documents that do not see each other; None means no masks.
        element: bytes of a number. norm_bytes: bytes that one norm keeps of a number.
        target_fraction: share of the tokens that the head predicts.
        label_smoothing: whether the loss is smoothed over the vocabulary.
    """

    tokens: int
    samples: int = 1
    memory_tokens: int = 0
    tensor: int = 1
    sequence: bool = False
    recompute: bool = False
    compiled: bool = False
    eager_cpu: bool = False
    cpu: bool = False
    sample_masks: bool = False
    document_tokens: float | None = None
    element: int = 4
    norm_bytes: float = 8
    target_fraction: float = 1.0
    label_smoothing: bool = False

    @property
    def batch_tokens(self) -> int:
        """Return the tokens of the micro-batch: B x T."""
        return self.samples * self.tokens

    @property
    def batch_memory_tokens(self) -> int:
        """Return the tokens of the texts that are read: B x S."""
        return self.samples * self.memory_tokens

    def stream_width(self, model: ModelConfig) -> int:
        """Return D, divided by the ranks if they share the tokens."""
        return model.hidden_size // self.tensor if self.sequence else model.hidden_size

    def dropout_bytes(self, model: ModelConfig) -> int:
        """Return the bytes of one number's mask of a hidden dropout.

        PyTorch's CPU dropout keeps a factor in the number's own type; CUDA's keeps a bool
        (native_dropout).
        """
        each = self.element if self.eager_cpu else 1
        return each if model.hidden_dropout > 0 else 0


@dataclass(frozen=True)
class Message:
    """A kind of collective call of the tensor group in one micro-batch.

    Attributes:
        elements: size of the whole tensor.
        fp32: if true, its numbers are fp32; if false, they have the precision of the run.
    """

    kind: MessageKind
    elements: int
    count: int = 1
    fp32: bool = False


def in_pieces(elements: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the pieces of a whole as (size, count): the full ones, and the rest, if any."""
    full, rest = divmod(elements, size)
    for each, count in ((size, full), (rest, 1)):
        if each and count:
            yield each, count


@dataclass(frozen=True)
class Kept:
    """Bytes that a part keeps for the backward on one rank.

    Attributes:
        norm: a token's, by norms. values: a token's, by everything else.
        outputs: a token's, by matrix products, which selective recompute keeps.
        memory: of the micro-batch, from the text that is read; selective recompute keeps it.
        mask: of the micro-batch, by fused attention. scores: by attention without a fused kernel.
        work: a token's gradients that exist at once within the part.
        large: a token's, of single tensors that are large enough to leave the heap.
    """

    norm: float = 0
    values: int = 0
    outputs: int = 0
    memory: int = 0
    mask: int = 0
    scores: int = 0
    work: int = 0
    large: tuple[int, ...] = ()


@dataclass(frozen=True)
class Logits:
    """Bytes of a head and its loss on one rank.

    Attributes:
        chunk: logits that exist at once. gradients: gradients that the fused loss makes.
        traffic: logits that pass through memory, forward and backward.
    """

    chunk: int = 0
    gradients: int = 0
    traffic: float = 0.0


@dataclass(frozen=True)
class Cost:
    """The cost of a part.

    Attributes:
        products: FLOPs of its matrix products, for one sample and all ranks together.
        attention: FLOPs of attention, likewise.
        messages: collectives of the tensor group in a micro-batch.
        kept: bytes for the backward. logits: bytes of a head.
        moved: bytes that the forward moves through memory besides weights, in a micro-batch.
        kernels: kernels that its forward starts.
    """

    products: Pair = (0.0, 0.0)
    attention: Pair = (0.0, 0.0)
    messages: tuple[Message, ...] = ()
    kept: Kept = Kept()
    logits: Logits = Logits()
    moved: int = 0
    kernels: int = 0


@dataclass(frozen=True)
class Grads:
    """The gradients that a backward makes in a part.

    Attributes:
        trained: names of the parameters that have one.
        inputs: names of the parameters whose input has one.
    """

    trained: frozenset[str]
    inputs: frozenset[str]

    @property
    def has_backward(self) -> bool:
        """Return whether there is any gradient."""
        return bool(self.trained or self.inputs)

    def products(self, weight: str) -> int:
        """Return how many products the backward makes for one of the forward."""
        return (weight in self.trained) + (weight in self.inputs)


@dataclass
class Flow:
    """The way of gradients through a model, followed in the order of the forward.

    A hidden state has a gradient as soon as something on its way is trained.

    Attributes:
        trained: names of the parameters that are trained.
        hidden: whether the hidden states at this point have a gradient.
        memory: whether those of the text that is read have one.
        bias: whether the distance biases of attention's scores have one.
        inputs: names found so far of parameters whose input has a gradient.
    """

    trained: frozenset[str]
    hidden: bool = False
    memory: bool = False
    bias: bool = False
    inputs: set[str] = field(default_factory=set)

    def through(self, specs: Iterable[ParameterSpec], stream: bool) -> bool:
        """Lead a stream through parameters; return whether it has a gradient behind them."""
        for spec in specs:
            if stream:
                self.inputs.add(spec.name)
            stream = stream or spec.name in self.trained
        return stream

    def trains(self, specs: Iterable[ParameterSpec]) -> bool:
        """Return whether any of some parameters is trained."""
        return any(spec.name in self.trained for spec in specs)


class Part(Protocol):
    """A part of a model."""

    def rows(self, model: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
        """Yield its parameters in the order of `named_parameters()`.

        Args:
            prefix: leads each name, such as "model.layers.0."; empty for the model itself.
        """
        ...

    def follow(self, model: ModelConfig, specs: Sequence[ParameterSpec], flow: Flow) -> None:
        """Lead `flow` through the part, whose parameters are `specs`, adapters included."""
        ...

    def cost(
        self, model: ModelConfig, specs: Sequence[ParameterSpec], load: Workload, grads: Grads
    ) -> Cost:
        """Return its cost.

        Args:
            specs: its parameters under an empty prefix, adapters included.
            grads: its gradients, by the names in `specs`.
        """
        ...
