"""MegaLite: train large Transformer models so that the run can be trusted.

The names of `__all__` are the library; docs/api.md describes them. Each is imported when it is
first used, so that `import megalite` imports nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalite.api import (
        Model,
        RunResult,
        Shards,
        finetune,
        load,
        make_plan,
        open_shards,
        pretrain,
    )
    from megalite.config import RunConfig
    from megalite.train.hooks import Hook, Outcome, SaveReport, StepReport

__version__ = "0.1.0"

__all__ = [
    "Hook",
    "Model",
    "Outcome",
    "RunConfig",
    "RunResult",
    "SaveReport",
    "Shards",
    "StepReport",
    "finetune",
    "load",
    "make_plan",
    "open_shards",
    "pretrain",
]

_HOMES = {
    "RunConfig": "megalite.config",
    **dict.fromkeys(("Hook", "Outcome", "SaveReport", "StepReport"), "megalite.train.hooks"),
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "megalite.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
