"""The element-wise fp32 states that an optimizer keeps for each parameter.

They follow from the facts that an optimizer is registered with (`megalite.optim.optimizers`):

    states          their names, in the order of a checkpoint's files
    matrix_states   their names for the matrices of blocks, if their update differs
    states_need     key of the optimizer section; if its value is 0, there are no states
    counts_steps    whether parameters with `states` also count their updates (Adam's `step`)
"""

from __future__ import annotations

from functools import lru_cache

from megalite import arch, registry
from megalite.config import FinetuneConfig, ModelConfig, OptimizerConfig, RunConfig
from megalite.errors import UserError
from megalite.plan.zero import local_sizes


def state_names(config: RunConfig, row: arch.ParameterSpec) -> tuple[str, ...]:
    """Return the names of a parameter's optimizer states."""
    return _state_names(config.optimizer, row) if arch.is_trainable(config, row) else ()


def _state_names(optimizer: OptimizerConfig, row: arch.ParameterSpec) -> tuple[str, ...]:
    facts = registry.optimizers.facts(optimizer.name)
    if "states" not in facts:
        raise UserError(
            f"optimizer.{optimizer.name}: its package does not list the optimizer's states; add "
            f"`states` to part.{optimizer.name} (docs/extending.md)"
        )
    needed = facts.get("states_need")
    if needed and not getattr(optimizer, needed):
        return ()
    kind = "matrix_states" if "matrix_states" in facts and row.is_matrix_of_block else "states"
    return tuple(facts.get(kind, ()))


def counts_steps(config: RunConfig, row: arch.ParameterSpec) -> bool:
    """Return whether the optimizer counts a parameter's updates, in the state `step`."""
    facts = registry.optimizers.facts(config.optimizer.name)
    by_matrix = "matrix_states" in facts and row.is_matrix_of_block
    return bool(facts.get("counts_steps")) and not by_matrix


def updates_matrices(config: RunConfig) -> bool:
    """Return whether the optimizer updates the matrices of blocks in a separate way."""
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
