"""The element-wise fp32 states that an optimizer keeps of each parameter.

They follow from the facts that an optimizer is registered with (`megalite.optim.optimizers`):

    states          their names, in the order of a checkpoint's files
    matrix_states   their names for the matrices of blocks, if those are updated in another way
    states_need     the key of the optimizer section without which (at 0) no state is kept
    counts_steps    whether a parameter with `states` has a count of updates as well, Adam's `step`
"""

from __future__ import annotations

from functools import lru_cache

from megalite import arch, registry
from megalite.config import FinetuneConfig, ModelConfig, OptimizerConfig, RunConfig
from megalite.errors import UserError
from megalite.plan.zero import local_sizes


def state_names(config: RunConfig, row: arch.ParameterSpec) -> tuple[str, ...]:
    """Return the names of the states that the optimizer keeps of a parameter."""
    return _state_names(config.optimizer, row) if arch.is_trainable(config, row) else ()


def _state_names(optimizer: OptimizerConfig, row: arch.ParameterSpec) -> tuple[str, ...]:
    facts = registry.optimizers.facts(optimizer.name)
    if "states" not in facts:
        raise UserError(
            f"optimizer.{optimizer.name}: its package states no `states`, names of what it keeps "
            f"of a parameter; add them to part.{optimizer.name} (docs/extending.md)"
        )
    needed = facts.get("states_need")
    if needed and not getattr(optimizer, needed):
        return ()
    kind = "matrix_states" if "matrix_states" in facts and row.is_matrix_of_block else "states"
    return tuple(facts.get(kind, ()))


def counts_steps(config: RunConfig, row: arch.ParameterSpec) -> bool:
    """Return whether the optimizer counts the updates of a parameter, in its state `step`."""
    facts = registry.optimizers.facts(config.optimizer.name)
    by_matrix = "matrix_states" in facts and row.is_matrix_of_block
    return bool(facts.get("counts_steps")) and not by_matrix


def updates_matrices(config: RunConfig) -> bool:
    """Return whether the optimizer has an update of its own for the matrices of blocks."""
    return "matrix_states" in registry.optimizers.facts(config.optimizer.name)


def state_bytes(config: RunConfig, tensor: int) -> int:
    """Return the bytes of all states of the parameters on one of `tensor` tensor ranks."""
    return _state_bytes(config.model, config.finetune, config.optimizer, tensor)


@lru_cache(maxsize=64)
def _state_bytes(
    model: ModelConfig, tuning: FinetuneConfig | None, optimizer: OptimizerConfig, tensor: int
) -> int:
    sizes = local_sizes(model, tensor)
    return 4 * sum(
        len(_state_names(optimizer, row)) * sizes[row.name]
        for row in arch.parameters(model)
        if arch.is_trainable_under(tuning, row)
    )
