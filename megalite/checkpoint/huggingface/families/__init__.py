"""Model families of Hugging Face. Each module of this package defines one as `FAMILY`.

To add a family, add a file here. An installed package adds one by an entry point
`family.MODEL_TYPE` whose object is a `Family`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from megalite import registry
from megalite.checkpoint.huggingface.family import Family


def _load() -> dict[str, Family]:
    """Return the families by model type, the preferred ones first, then by name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    families = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in modules]
    return {f.model_type: f for f in sorted(families, key=lambda family: not family.preferred)}


FAMILIES = _load()


def find_family(model_type: str) -> Family | None:
    """Return the family of a model type, built in or of an installed package."""
    if model_type in FAMILIES or model_type not in registry.families.names:
        return FAMILIES.get(model_type)
    family: Family = registry.families.load(model_type)
    return family


def all_families() -> Iterator[Family]:
    """Yield every family. Those of packages come last, and are imported only when reached."""
    yield from FAMILIES.values()
    yield from (registry.families.load(name) for name in registry.families.names)
