"""The parameters of norms, and their place in a residual branch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megalite import registry
from megalite.arch.table import Init, ParameterSpec, Sees, specify
from megalite.config import ModelConfig


def norm_rows(
    model: ModelConfig, name: str, *, sees: Sees = Sees.OWN_TOKENS
) -> Iterator[ParameterSpec]:
    """Yield the gain of the model's norm, and its bias if it has one.

    Args:
        name: dotted name of the module.
    """
    width = (model.hidden_size,)
    yield specify(f"{name}.weight", width, init=Init.ONES, sees=sees)
    if "bias" in registry.norms.facts(model.norm).get("parameters", ()):
        yield specify(f"{name}.bias", width, sees=sees)


def in_forward_order(
    model: ModelConfig, specs: Sequence[ParameterSpec], norm: str
) -> list[ParameterSpec]:
    """Return a branch's parameters in the order of its forward: a post-norm comes last.

    Args:
        norm: name of the branch's norm, without the block's name.
    """
    if model.norm_position == "pre":
        return list(specs)
    return sorted(specs, key=lambda spec: f"{norm}." in spec.name)


def is_block_norm(spec: ParameterSpec) -> bool:
    """Return whether a parameter is the gain of a residual branch's norm."""
    return bool(spec.block) and spec.init is Init.ONES and spec.sees is Sees.OWN_TOKENS
