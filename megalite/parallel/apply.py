"""Recompute and compilation of a model's blocks, in a fixed order.

    recompute   blocks save fewer activations and compute them again in the backward
    compile     each block's forward, recompute included, becomes fused kernels

The order matters: recompute inside the compiled forward is traced with it. The other order would
break the graph at each block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megalite.model.stack import Block

# Selective recompute saves the results of matrix products. Norms, activations, rotations and
# dropout cost little and are computed again (Korthikanti et al. 2022, by torch's policies for each
# operation).
_SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def apply_recompute_and_compile(
    blocks: Iterable[Block], *, recompute: str, compile_blocks: bool
) -> None:
    """Set up recompute and compilation of each block.

    Args:
        blocks: the repeated blocks of a model.
        recompute: "none", "selective" (save matrix products and attention) or "full" (save only
            the block's input).
        compile_blocks: whether to compile each block. Equal blocks share the compiled code.
    """
    for block in blocks:
        if recompute == "full":
            block.wrap(_recompute_all)
        elif recompute == "selective":
            # torch.compile reads the policy out of torch's own contexts
            # (torch/_higher_order_ops/wrap.py: TagActivationCheckpoint)
            torch_contexts = partial(create_selective_checkpoint_contexts, _policy)
            contexts = torch_contexts if compile_blocks else partial(_contexts, torch_contexts)
            block.wrap(partial(_recompute_selectively, contexts))
        if compile_blocks:
            block.wrap(torch.compile)


def _recompute_all(forward: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False)


def _recompute_selectively(
    contexts: Callable[[], tuple[Any, Any]], forward: Callable[..., Any]
) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def _contexts(make: Callable[[], tuple[Any, Any]]) -> tuple[_SavedOpsOnly, _SavedOpsOnly]:
    forward, recompute = make()
    return _SavedOpsOnly(forward), _SavedOpsOnly(recompute)


class _SavedOpsOnly(TorchDispatchMode):
    """A mode that shows torch's recompute only the operations whose results are saved.

    Torch requires the same operations in forward and recompute. ZeRO-3 adds operations around
    layers that may differ: it fetches weights, or they are there already.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAVED_OPS:
            return self._mode.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _policy(_context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    save = op in _SAVED_OPS and not _has_dropout(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def _has_dropout(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation applies dropout.

    If its result was saved, the recompute would not advance the random generator.
    """
    names = [argument.name for argument in op._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p"))
