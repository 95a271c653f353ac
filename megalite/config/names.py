"""Values of a run file that are names of a registry, and the packages that such names come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megalite.config.fields import Section
from megalite.errors import UserError
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
        try:
            self.registry.plugin(name)
        except UserError as error:
            raise ValueError(f"a name of one package: {error}") from None
        return name


def load_plugins(section: Section) -> None:
    """Import every object that a run file names.

    Raises:
        UserError: one that cannot be imported.
    """
    for registry, name in _used(section):
        if registry.plugin(name) is not None:
            registry.load(name)


def plugins_of(section: Section) -> dict[str, str]:
    """Return the packages that names in a run file come from, as {"norm.scaled": "toy 1.0"}."""
    found: dict[str, str] = {}
    for registry, name in _used(section):
        plugin = registry.plugin(name)
        if plugin is not None:
            found[f"{registry.kind}.{name}"] = str(plugin)
    return found


def _used(section: Section) -> Iterator[tuple[Registry[Any], str]]:
    """Yield each name of a registry that a section holds, with its registry."""
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from _used(value)
            continue
        kinds = [*field.metadata]
        for inner in getattr(field.annotation, "__args__", ()):  # of a list's items
            kinds += getattr(inner, "__metadata__", ())
        for kind in kinds:
            if isinstance(kind, NameOf):
                names = [value] if isinstance(value, str) else value
                yield from ((kind.registry, name) for name in names)
