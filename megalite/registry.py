"""Names that a run file may use for a norm, an optimizer, a reader and so on, and their objects.

An entry comes from one of three places: a module of this project, user code that calls
`registry.norms.register("scaled")`, or an installed package. A package declares entry points in the
group `megalite.plugins`, named KIND.NAME, such as `norm.scaled = my_package.norms:Scaled`.

Listing names imports nothing. Names of this project are read from the source of the kind's home
module, and names of packages from their metadata. So checking a run file imports neither torch nor
a plug-in; `load` imports one module when its object is used. An entry may have *facts*, plain
values for code without torch. They are the keyword arguments of `register`. A package declares them
with a second entry point, `part.NAME`, whose object is a mapping.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from megalite.errors import UserError, nearest

GROUP = "megalite.plugins"
_PROJECT = Path(__file__).parents[1]

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin:
    """An entry of an installed package.

    Attributes:
        point: the entry point.
        package: the name of the package.
        version: the version of the package.
        clashes: another package that declares the same name. This is an error only if a run uses
            the name.
    """

    point: EntryPoint
    package: str
    version: str
    clashes: str = ""

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


class Registry(Generic[T]):
    """The entries of one kind by name.

    Args:
        kind: the name of the kind in entry points and messages, such as "norm".
        plural: the registry's name in this module, such as "norms".
        home: the module that registers the built-in entries. None means that there are none.
    """

    def __init__(self, kind: str, plural: str, home: str | None) -> None:
        self.kind, self._plural, self._home = kind, plural, home
        self._entries: dict[str, T] = {}
        self._facts: dict[str, Mapping[str, Any]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Return a decorator that registers an object under `name`.

        Args:
            name: the name.
            facts: plain values for code without torch. In a home module they must be literals.
        Raises:
            UserError: the name already exists.
        """

        def add(entry: T) -> T:
            # the home module registers each built-in name once, when it is imported
            is_home = name in self.builtin and self._home in sys.modules
            if name in self._entries or (name in self.names and not is_home):
                raise UserError(f'{self.kind} "{name}" already exists; register another name')
            self._entries[name], self._facts[name] = entry, facts
            return entry

        return add

    @cached_property
    def builtin(self) -> tuple[str, ...]:
        """The names that the home module registers, in its order."""
        return tuple(self._declared)

    @property
    def plugins(self) -> Mapping[str, Plugin]:
        """The entries of installed packages by name."""
        return {name: plugin for (kind, name), plugin in _points().items() if kind == self.kind}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, built-in ones first."""
        return tuple(dict.fromkeys((*self.builtin, *self._entries, *self.plugins)))

    def load(self, name: str) -> T:
        """Return the object of a name; import its module if necessary.

        Raises:
            UserError: the name is unknown, or its plug-in cannot be imported.
        """
        if name not in self._entries and name in self.builtin:
            importlib.import_module(str(self._home))
        if name not in self._entries and (plugin := self.plugin(name)):
            self._entries[name] = _load(plugin)
        if name not in self._entries:
            raise UserError(self.unknown(name))
        return self._entries[name]

    def facts(self, name: str) -> Mapping[str, Any]:
        """Return the facts of a name; an empty mapping if it has none."""
        if name in self._facts:
            return self._facts[name]
        if name in self._declared:
            return self._declared[name]
        point = _points().get(("part", name))
        facts = _load(point) if point and self.plugin(name) else {}
        if not isinstance(facts, Mapping):
            raise UserError(
                f"part.{name} of {point} is not a mapping of facts to values; fix or uninstall the "
                "package"
            )
        self._facts[name] = facts
        return facts

    def plugin(self, name: str) -> Plugin | None:
        """Return the package of a name. None means that this project or process registered it.

        Raises:
            UserError: two packages, or a package and this project, declare the name.
        """
        plugin = self.plugins.get(name)
        if plugin is not None and (name in self.builtin or plugin.clashes):
            other = "this project" if name in self.builtin else plugin.clashes
            raise UserError(
                f"{plugin.point.name} is declared twice, by {plugin} and by {other}; uninstall one "
                "package, or rename its entry point"
            )
        return plugin

    def unknown(self, name: str) -> str:
        """Return the message for an unknown name."""
        return (
            f'unknown {self.kind} "{name}"{nearest(name, self.names)}; use one of '
            f"{', '.join(self.names)}"
        )

    @cached_property
    def _declared(self) -> dict[str, dict[str, Any]]:
        """Facts by name, from the calls of `register` in the source of the home module."""
        if self._home is None:
            return {}
        source = (_PROJECT / self._home.replace(".", "/")).with_suffix(".py")
        declared: dict[str, dict[str, Any]] = {}
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                f"{self._plural}.register"
            ):
                facts = {str(item.arg): ast.literal_eval(item.value) for item in node.keywords}
                declared[ast.literal_eval(node.args[0])] = facts
        return declared


@lru_cache(maxsize=1)
def _points() -> dict[tuple[str, str], Plugin]:
    """Return the entry points of installed packages by kind and name, without an import."""
    plugins: dict[tuple[str, str], Plugin] = {}
    for point in entry_points(group=GROUP):
        kind, _, name = point.name.partition(".")
        package = point.dist
        plugin = Plugin(point, package.name if package else "?", package.version if package else "")
        other = plugins.setdefault((kind, name), plugin)
        if other.point.value != point.value:
            plugins[kind, name] = replace(other, clashes=str(plugin))
    return plugins


def _load(plugin: Plugin) -> Any:
    try:
        return plugin.point.load()
    except Exception as error:  # any exception of a package's module is a fault of the package
        raise UserError(
            f"{plugin.point.name} of the package {plugin} cannot be loaded: "
            f"{type(error).__name__}: {error}; fix or uninstall the package"
        ) from error


norms: Registry[Any] = Registry("norm", "norms", "megalite.model.norms")
activations: Registry[Any] = Registry("activation", "activations", "megalite.model.mlp")
optimizers: Registry[Any] = Registry("optimizer", "optimizers", "megalite.optim.optimizers")
objectives: Registry[Any] = Registry("objective", "objectives", "megalite.model.objectives")
families: Registry[Any] = Registry("family", "families", None)
readers: Registry[Any] = Registry("reader", "readers", "data_prep.readers")
tasks: Registry[Any] = Registry("task", "tasks", "megalite.config.tasks")
sinks: Registry[Any] = Registry("sink", "sinks", None)
