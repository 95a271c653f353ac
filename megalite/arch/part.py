"""The interface of a model's parts: their parameters, their cost, and which gradients exist.

A part is a pair of files with one name. The file here states its parameters and costs without
torch. The file under `megalite/model` computes.

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
Pair = tuple[float, float]  # (forward, backward)


@dataclass(frozen=True)
class Workload:
    """The micro-batch of one rank in one stack, and the settings that its cost depends on.

    Attributes:
        tokens: T.
        samples: B.
        memory_tokens: S, or 0.
        tensor: number of ranks that share each matrix.
        sequence: whether these ranks share the tokens as well.
        recompute: whether the backward computes a block's forward again.
        compiled: whether blocks are compiled.
        eager_cpu: whether PyTorch's eager CPU kernels run.
        cpu: whether the device is a CPU.
        sample_masks: whether each sample has its own mask, for documents or padding.
        document_tokens: mean length of documents that do not see each other. None means that
            documents are not masked.
        element: bytes of an activation's element.
        norm_bytes: bytes that a norm saves per element of its input.
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
        """Return the tokens of the encoder's texts in the micro-batch: B x S."""
        return self.samples * self.memory_tokens

    def stream_width(self, model: ModelConfig) -> int:
        """Return the width of the residual stream per token and rank: D, or D / ranks.

        It is D / ranks if the ranks share the tokens.
        """
        return model.hidden_size // self.tensor if self.sequence else model.hidden_size

    def dropout_bytes(self, model: ModelConfig) -> int:
        """Return the bytes that hidden dropout saves per element.

        PyTorch's CPU dropout saves a factor in the element's type. CUDA's saves a bool
        (native_dropout).
        """
        each = self.element if self.eager_cpu else 1
        return each if model.hidden_dropout > 0 else 0


@dataclass(frozen=True)
class Message:
    """Identical collective calls of the tensor group in one micro-batch.

    Attributes:
        elements: size of the whole tensor.
        count: number of calls.
        fp32: if true, elements are fp32. If false, they have the precision of the run.
    """

    kind: MessageKind
    elements: int
    count: int = 1
    fp32: bool = False


def chunk_sizes(elements: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the chunks of a tensor as (size, count): the full ones, and the rest, if any."""
    full, rest = divmod(elements, size)
    for each, count in ((size, full), (rest, 1)):
        if each and count:
            yield each, count


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that a part saves for the backward on one rank.

    Attributes:
        norm: per token, by norms.
        values: per token, by everything else.
        outputs: per token, by matrix products, whose results selective recompute saves.
        memory: per micro-batch, of the encoder's text. Selective recompute saves them.
        mask: per micro-batch, of the mask of fused attention.
        scores: per micro-batch, of the scores of attention without a fused kernel.
        work: per token, of gradients that exist at the same time within the part.
        large: per token, of each tensor that may be too large for the heap.
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
        chunk: logits that exist at the same time.
        gradients: gradients that the fused loss computes in the forward.
        traffic: reads and writes of logits, in forward and backward.
    """

    chunk: int = 0
    gradients: int = 0
    traffic: float = 0.0


@dataclass(frozen=True)
class Cost:
    """The cost of a part.

    Attributes:
        products: FLOPs of its matrix products, for one sample and all ranks together.
        attention: FLOPs of attention, for one sample and all ranks together.
        messages: collectives of the tensor group in a micro-batch.
        saved: bytes saved for the backward.
        logits: bytes of a head.
        moved: bytes that the forward reads and writes in a micro-batch, without weights.
        kernels: number of kernels that the forward launches.
    """

    products: Pair = (0.0, 0.0)
    attention: Pair = (0.0, 0.0)
    messages: tuple[Message, ...] = ()
    saved: SavedBytes = SavedBytes()
    logits: Logits = Logits()
    moved: int = 0
    kernels: int = 0


@dataclass(frozen=True)
class Grads:
    """The gradients that the backward computes in a part.

    Attributes:
        trained: names of the parameters that have a gradient.
        inputs: names of the parameters whose input has a gradient.
    """

    trained: frozenset[str]
    inputs: frozenset[str]

    @property
    def has_backward(self) -> bool:
        """Return whether there is any gradient."""
        return bool(self.trained or self.inputs)

    def products(self, weight: str) -> int:
        """Return how many matrix products the backward computes per product of the forward."""
        return (weight in self.trained) + (weight in self.inputs)


@dataclass
class Flow:
    """The tensors that have a gradient, tracked in the order of the forward.

    A hidden state has a gradient if any parameter before it is trained.

    Attributes:
        trained: names of the parameters that are trained.
        hidden: whether the hidden states at this point have a gradient.
        memory: whether the hidden states of the encoder's text have a gradient.
        bias: whether the relative position biases of the scores have a gradient.
        inputs: names of the parameters so far whose input has a gradient.
    """

    trained: frozenset[str]
    hidden: bool = False
    memory: bool = False
    bias: bool = False
    inputs: set[str] = field(default_factory=set)

    def through(self, specs: Iterable[ParameterSpec], stream: bool) -> bool:
        """Pass a tensor through parameters. Return whether the result has a gradient.

        Args:
            stream: whether the tensor has a gradient before them.
        """
        for spec in specs:
            if stream:
                self.inputs.add(spec.name)
            stream = stream or spec.name in self.trained
        return stream

    def trains(self, specs: Iterable[ParameterSpec]) -> bool:
        """Return whether any of the parameters is trained."""
        return any(spec.name in self.trained for spec in specs)


class Part(Protocol):
    """A part of a model."""

    def rows(self, model: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
        """Yield the part's parameters in the order of `named_parameters()`.

        Args:
            prefix: beginning of each name, such as "model.layers.0."; empty for the model itself.
        """
        ...

    def follow(self, model: ModelConfig, specs: Sequence[ParameterSpec], flow: Flow) -> None:
        """Update `flow` by the part, whose parameters are `specs`, adapters included."""
        ...

    def cost(
        self, model: ModelConfig, specs: Sequence[ParameterSpec], load: Workload, grads: Grads
    ) -> Cost:
        """Return the part's cost.

        Args:
            specs: the part's parameters under an empty prefix, adapters included.
            grads: the part's gradients, by the names in `specs`.
        """
        ...
