"""The element-wise fp32 states that an optimizer keeps of each parameter.

They follow from the facts that an optimizer is registered with (`megalite.optim.optimizers`):

    states          their names, in the order of a checkpoint's files
    matrix_states   their names for the matrices of blocks, if those are updated in another way
    states_need     the key of the optimizer section without which (at 0) no state is kept
"""

from __future__ import annotations

import math

from megalite import arch, registry
from megalite.config import RunConfig
from megalite.mesh import Mesh


def state_names(config: RunConfig, row: arch.ParameterSpec) -> tuple[str, ...]:
    """Return the names of the states that the optimizer keeps of a parameter."""
    section = config.optimizer
    facts = registry.optimizers.facts(section.name)
    needed = facts.get("states_need")
    if not arch.is_trainable(config, row) or (needed and not getattr(section, needed)):
        return ()
    kind = "matrix_states" if updates_matrices(config) and row.is_matrix_of_block else "states"
    return tuple(facts.get(kind, ()))


def updates_matrices(config: RunConfig) -> bool:
    """Return whether the optimizer has an update of its own for the matrices of blocks."""
    return "matrix_states" in registry.optimizers.facts(config.optimizer.name)


def state_bytes(config: RunConfig, tensor: int) -> int:
    """Return the bytes of all states of the parameters on one of `tensor` tensor ranks."""
    at = Mesh(tensor=tensor).at(0)
    return 4 * sum(
        len(state_names(config, row)) * math.prod(arch.local_shape(row, at))
        for row in arch.parameters(config.model)
    )
