"""Values of a run file that are names of a registry, and the packages that provide them."""

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
    """Annotation of a field whose value is a name of a registry.

    The JSON schema, from which editors complete, lists the built-in names only. So it does not
    depend on the packages that are installed.
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
            raise ValueError(f"a name of one package only ({error})") from None
        return name


def run_folder(raw: Mapping[str, Any]) -> Path | None:
    """Return the run folder that an unchecked run file names; None without a valid name."""
    logging = raw.get("logging", {})
    name = raw.get("name")
    directory = logging.get("directory", "runs") if isinstance(logging, dict) else None
    if not isinstance(directory, str) or not isinstance(name, str):
        return None
    return Path(os.path.expanduser(directory)) / name


def missing_plugin(name: str, raw: Mapping[str, Any]) -> str | None:
    """Return the advice to install the package of a name; None if no record names the package.

    Args:
        name: the name with its kind, such as "norm.scaled".
        raw: an unchecked run file. It or its run folder may record the package.
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
    """Import every plug-in that a run file names.

    Raises:
        UserError: a plug-in cannot be imported.
    """
    for registry, name in _used(section):
        if registry.plugin(name) is not None:
            registry.load(name)


def plugins_of(section: Section) -> dict[str, str]:
    """Return the packages that provide names in a run file, as {"norm.scaled": "toy 1.0"}."""
    packages: dict[str, str] = {}
    for registry, name in _used(section):
        plugin = registry.plugin(name)
        if plugin is not None:
            packages[f"{registry.kind}.{name}"] = str(plugin)
    return packages


def _used(section: Section) -> Iterator[tuple[Registry[Any], str]]:
    """Yield each name of a registry in a section, with its registry."""
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from _used(value)
            continue
        kinds = [*field.metadata]
        for inner in getattr(field.annotation, "__args__", ()):  # the items of a list
            kinds += getattr(inner, "__metadata__", ())
        for kind in kinds:
            if isinstance(kind, NameOf):
                names = [value] if isinstance(value, str) else value
                yield from ((kind.registry, name) for name in names)
