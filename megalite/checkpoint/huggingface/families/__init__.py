"""The families of Hugging Face's models. Each module of this package defines one, as `FAMILY`.

A new family is a new file here: the package lists its modules itself.
"""

from __future__ import annotations

import importlib
import pkgutil

from megalite.checkpoint.huggingface.family import Family


def _load() -> dict[str, Family]:
    """Return the families by model type, with the preferred ones first, then by name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    families = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in modules]
    return {f.model_type: f for f in sorted(families, key=lambda family: not family.preferred)}


FAMILIES = _load()
