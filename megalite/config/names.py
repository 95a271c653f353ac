"""Values of a run file that are names of a registry, and the packages that such names come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megalite.config.fields import Section
from megalite.errors import UserError
from megalite.files import read_object
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


def run_folder(raw: Mapping[str, Any]) -> Path | None:
    """Return the run folder that an unchecked run file means; None if it names none."""
    logging = raw.get("logging", {})
    name = raw.get("name")
    directory = logging.get("directory", "runs") if isinstance(logging, dict) else None
    if not isinstance(directory, str) or not isinstance(name, str):
        return None
    return Path(os.path.expanduser(directory)) / name


def missing_plugin(name: str, raw: Mapping[str, Any]) -> str | None:
    """Return which package a name needs, if the run file or its run folder records it.

    Args:
        name: with its kind, such as "norm.scaled".
        raw: an unchecked run file.
    """
    recorded = raw.get("plugins")
    if recorded is None:
        recorded = _recorded_plugins(raw)
    package = recorded.get(name) if isinstance(recorded, dict) else None
    if not isinstance(package, str):
        return None
    return f"it is {name} of the package {package}, which is not installed here; install it"


def _recorded_plugins(raw: Mapping[str, Any]) -> Any:
    folder = run_folder(raw)
    try:
        return read_object(folder / "config.json").get("plugins") if folder else None
    except (OSError, ValueError, RecursionError):
        return None


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
