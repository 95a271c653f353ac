"""Undo the changes that DeepSpeed makes to its process.

Files that comments name are those of DeepSpeed 0.19.8, below deepspeed/.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import get_all_subclasses
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups
from torch import Tensor, nn

# attributes of torch that runtime/zero/partition_parameters.py patches (patch_init_and_builtins)
# and restores only in part (unpatch_init_and_builtins)
_PATCHED: tuple[tuple[Any, str], ...] = (
    (F, "linear"),
    (F, "embedding"),
    (nn.Module, "__init_subclass__"),
    (nn.Module, "_old_init_subclass"),
    (nn.Module, "apply"),
    (nn.Module, "_old_apply"),
    (Tensor, "__new__"),
    (Tensor, "__old_new__"),
)
# the cached method __params_to_release of runtime/zero/partitioned_param_coordinator.py
_CACHED = "_PartitionedParameterCoordinator__params_to_release"
_OLD_INIT = "_old_init"  # patch_init_and_builtins adds it to every subclass of nn.Module
_ABSENT = object()


class ProcessState:
    """The state of this process at construction, as far as DeepSpeed changes it."""

    def __init__(self) -> None:
        self._before = [(owner, name, _value(owner, name)) for owner, name in _PATCHED]

    def restore(self) -> None:
        """Undo an engine's changes, and drop DeepSpeed's references to the engine."""
        for owner, name, value in self._before:
            if _value(owner, name) is value:
                continue
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        for subclass in get_all_subclasses(nn.Module):
            if _OLD_INIT in vars(subclass):
                delattr(subclass, _OLD_INIT)
        # this stack keeps its first module forever (setup_zero_stage3_hooks)
        parameter_offload.FWD_MODULE_STACK.clear()
        # references only: torch destroys the process groups with the grid
        groups._release_process_group_references()
        _clear_cache(vars(PartitionedParameterCoordinator)[_CACHED])


def _clear_cache(wrapper: Any) -> None:
    """Clear the cache of a wrapped method, whose keys refer to every module."""
    for cell in wrapper.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _value(owner: Any, name: str) -> Any:
    """Return an attribute of a module or class itself, without its bases; `_ABSENT` if missing."""
    return vars(owner).get(name, _ABSENT)
