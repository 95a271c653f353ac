"""The FLOPs of a part's matrix products, and the messages of ranks that share the matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megalite.arch.part import Grads, Message, MessageKind, Pair, Workload
from megalite.arch.table import ParameterSpec

# compiled (True) or eager (False): how often the norm and the sum of a branch read or write the
# residual stream
RESIDUAL_PASSES = {True: 3, False: 7}
# compiled (True) or eager (False): kernels that a branch launches
KERNELS = {True: 6, False: 13}


def of_module(specs: Iterable[ParameterSpec], module: str) -> list[ParameterSpec]:
    """Return those parameters that belong to a module."""
    return [spec for spec in specs if spec.name.rpartition(".")[0] == module]


def product_flops(specs: Iterable[ParameterSpec], tokens: int, grads: Grads) -> Pair:
    """Return a sample's FLOPs of the products with the matrices among `specs`.

    A token costs 2 FLOPs per element in the forward. In the backward it costs 2 for the weight's
    gradient and 2 for the input's gradient, if they exist.
    """
    forward = backward = 0.0
    for spec in specs:
        if spec.is_matrix_of_block or spec.is_adapter:
            product = 2.0 * spec.elements * tokens
            forward += product
            backward += product * grads.products(spec.name)
    return forward, backward


def add(*pairs: Pair) -> Pair:
    """Return the sums over forward and backward."""
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


class ProductMessages:
    """The messages of a part's column- and row-parallel products and of their adapters.

    Args:
        width: elements of a token in the residual stream: D.
    """

    def __init__(
        self, specs: Sequence[ParameterSpec], width: int, load: Workload, grads: Grads
    ) -> None:
        self._width, self._load, self._grads = width, load, grads
        # elements per token of an adapter's A x, by module: adapted projections x adapter's rank
        self.low = {
            spec.name.removesuffix(".lora_A"): sum(tensor.shape[0] for tensor in spec.tensors)
            for spec in specs
            if spec.name.endswith(".lora_A")
        }

    def column(self, module: str, tokens: int) -> Iterator[Message]:
        """Yield the messages of a column-parallel product: every rank reads the whole input.

        The backward sums the input's gradient. Under sequence parallelism the input is gathered in
        the forward, and again for the weight's gradient (Korthikanti et al. 2022, section 4.2.2).

        Args:
            tokens: tokens of the micro-batch.
        """
        grads = self._grads
        again = self._load.recompute
        weight = f"{module}.weight"
        whole = tokens * self._width
        low = tokens * self.low.get(module, 0)
        needs_grad = weight in grads.inputs
        low_needs_grad = grads.products(f"{module}.lora_A") > 0
        if not self._load.sequence:
            yield from _message("all_reduce", whole, needs_grad)
            yield from _message("all_reduce", low, low_needs_grad)
            return
        yield from _message("all_gather", whole, 1 + again + (weight in grads.trained))
        yield from _message("reduce_scatter", whole, needs_grad)
        yield from _message("all_gather", low, 1 + again)
        yield from _message("reduce_scatter", low, low_needs_grad)

    def row(self, module: str, tokens: int, *, again: bool) -> Iterator[Message]:
        """Yield the messages of a row-parallel product: the ranks sum their outputs.

        Args:
            tokens: tokens of the micro-batch.
            again: whether recompute repeats the sum in the backward.
        """
        whole = tokens * self._width
        low = tokens * self.low.get(module, 0)
        if not self._load.sequence:
            yield from _message("all_reduce", whole, 1 + again)
            yield from _message("all_reduce", low, 1 + again)
            return
        for elements, weight in ((whole, "weight"), (low, "lora_A")):
            yield from _message("reduce_scatter", elements, 1 + again)
            has_backward = self._grads.products(f"{module}.{weight}") > 0
            yield from _message("all_gather", elements, has_backward)


def _message(kind: MessageKind, elements: int, count: int) -> Iterator[Message]:
    if elements and count:
        yield Message(kind, elements, int(count))
