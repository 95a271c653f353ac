"""Changes that DeepSpeed makes to its process, and their undoing.

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

# Names of torch that runtime/zero/partition_parameters.py binds to its own objects
# (patch_init_and_builtins). Some of them stay bound (unpatch_init_and_builtins).
_BOUND: tuple[tuple[Any, str], ...] = (
    (F, "linear"),
    (F, "embedding"),
    (nn.Module, "__init_subclass__"),
    (nn.Module, "_old_init_subclass"),
    (nn.Module, "apply"),
    (nn.Module, "_old_apply"),
    (Tensor, "__new__"),
    (Tensor, "__old_new__"),
)
# runtime/zero/partitioned_param_coordinator.py, __params_to_release
_CACHED = "_PartitionedParameterCoordinator__params_to_release"
_OLD_INIT = "_old_init"  # which patch_init_and_builtins adds to every class of modules
_ABSENT = object()


class ProcessState:
    """State of this process that DeepSpeed changes, as it is when this object is made."""

    def __init__(self) -> None:
        self._before = [(owner, name, _value(owner, name)) for owner, name in _BOUND]

    def restore(self) -> None:
        """Undo what an engine has changed, and drop DeepSpeed's references to it."""
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
        # a stack of modules that the first module never leaves (setup_zero_stage3_hooks)
        parameter_offload.FWD_MODULE_STACK.clear()
        # process groups, which torch destroys with the grid
        groups._release_process_group_references()
        _clear_cache(vars(PartitionedParameterCoordinator)[_CACHED])


def _clear_cache(wrapper: Any) -> None:
    """Clear the cache of a method that DeepSpeed has wrapped; its keys hold every module."""
    for cell in wrapper.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _value(owner: Any, name: str) -> Any:
    """Return what a name is bound to in a module or class itself, not in its bases."""
    return vars(owner).get(name, _ABSENT)
