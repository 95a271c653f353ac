"""Recompute and compilation of a model's blocks, in one fixed order.

    recompute   blocks keep less of the forward and compute it again in the backward
    compile     each block's forward, recompute included, becomes fused kernels

The order matters: recompute inside the compiled forward is traced with it. In the other order every
block would break the graph.
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

# Selective recompute keeps the results that cost matrix products. Norms, activations, rotations and
# dropout cost little and are computed again (Korthikanti et al. 2022, in the finer form of torch's
# policies).
_KEEP = {
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
    """Have every block recompute parts of its forward and run compiled.

    Args:
        blocks: the repeated blocks of a model.
        recompute: "none", "selective" (keep matrix products and attention) or "full" (keep only
            the block's input).
        compile_blocks: whether to compile each block; equal blocks share the compiled code.
    """
    for block in blocks:
        if recompute == "full":
            block.wrap(_recompute_all)
        elif recompute == "selective":
            # torch.compile reads the policy out of torch's own contexts
            # (torch/_higher_order_ops/wrap.py: TagActivationCheckpoint)
            torchs = partial(create_selective_checkpoint_contexts, _policy)
            contexts = torchs if compile_blocks else partial(_contexts, torchs)
            block.wrap(partial(_recompute_some, contexts))
        if compile_blocks:
            block.wrap(torch.compile)


def _recompute_all(forward: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False)


def _recompute_some(
    contexts: Callable[[], tuple[Any, Any]], forward: Callable[..., Any]
) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def _contexts(make: Callable[[], tuple[Any, Any]]) -> tuple[_KeptOnly, _KeptOnly]:
    forward, recompute = make()
    return _KeptOnly(forward), _KeptOnly(recompute)


class _KeptOnly(TorchDispatchMode):
    """A mode that shows torch's bookkeeping only the operations that are kept.

    Torch compares the recompute's operations with the forward's. Those that an engine adds around a
    layer differ between the two: ZeRO-3 fetches and frees weights, or finds them fetched.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KEEP:
            return self._mode.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _policy(_context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in _KEEP and not _drops(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _drops(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation drops: if kept, it would not advance the random generator."""
    names = [argument.name for argument in op._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p"))
