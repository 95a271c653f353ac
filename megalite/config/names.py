"""Values of a run file that are names of a registry, and the packages that such names come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megalite.config.fields import Section
from megalite.registry import Registry


@dataclass(frozen=True)
class NameOf:
    """Annotation of a field that holds a name of a registry.

    The JSON schema, which editors complete by, lists the built-in names alone: it is the same on
    every machine, whatever packages are installed.
    """

    registry: Registry[Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        text: dict[str, Any] = {"type": "string"}
        return text | ({"enum": list(self.registry.builtin)} if self.registry.builtin else {})

    def _check(self, name: str) -> str:
        names = self.registry.names
        if name not in names:
            raise PydanticCustomError(
                "unknown_name",
                "no such name",
                {"kind": self.registry.kind, "names": ", ".join(names) or "(none)"},
            )
        return name


def plugins_of(section: Section) -> dict[str, str]:
    """Return the packages that names in a run file come from, as {"norm.scaled": "toy 1.0"}."""
    found: dict[str, str] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            found |= plugins_of(value)
            continue
        kinds = [*field.metadata]
        for inner in getattr(field.annotation, "__args__", ()):  # of a list's items
            kinds += getattr(inner, "__metadata__", ())
        for kind in kinds:
            if isinstance(kind, NameOf):
                for one in [value] if isinstance(value, str) else value:
                    plugin = kind.registry.plugin(one)
                    if plugin is not None:
                        found[f"{kind.registry.kind}.{one}"] = str(plugin)
    return found
