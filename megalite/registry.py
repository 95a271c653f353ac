"""Names that a run file may use for a norm, an optimizer, a reader and so on, and their objects.

An entry comes from one of three places: a module of this project, user code that calls
`registry.norms.register("scaled")`, or an installed package. A package declares entry points in the
group `megalite.plugins`, named KIND.NAME, such as `norm.scaled = my_package.norms:Scaled`.

Names are cheap. Those of this project are read from the source of the kind's home module, those of
packages from their metadata. So checking a run file imports neither torch nor a plug-in; `load`
imports one module when its object is used. An entry may have *facts*, plain values for code without
torch. They are the keyword arguments of `register`; a package has them in a second entry point,
`part.NAME`, whose object is a mapping.
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
    """An entry of an installed package. A clash is an error only for those who use the name."""

    point: EntryPoint
    package: str
    version: str
    clashes: str = ""  # another package that declares the name

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


class Registry(Generic[T]):
    """The entries of one kind by name.

    Args:
        kind: what an entry is, as entry points and messages name it: "norm".
        plural: the registry's name in this module: "norms".
        home: the module that registers the built-in entries. None: there are none.
    """

    def __init__(self, kind: str, plural: str, home: str | None) -> None:
        self.kind, self._plural, self._home = kind, plural, home
        self._entries: dict[str, T] = {}
        self._facts: dict[str, Mapping[str, Any]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Return a decorator that registers an object under `name`.

        Args:
            facts: plain values for code without torch. In a home module they are literals.
        Raises:
            UserError: the name is taken.
        """

        def add(entry: T) -> T:
            # the home module registers each built-in name once, when it is imported
            is_home = name in self.builtin and self._home in sys.modules
            if name in self._entries or (name in self.names and not is_home):
                raise UserError(f'there is a {self.kind} "{name}" already; register another name')
            self._entries[name], self._facts[name] = entry, facts
            return entry

        return add

    @cached_property
    def builtin(self) -> tuple[str, ...]:
        """The names that this project registers, in the order of the home module."""
        return tuple(self._declared)

    @property
    def plugins(self) -> Mapping[str, Plugin]:
        """The entries of installed packages by name."""
        return {name: plugin for (kind, name), plugin in _points().items() if kind == self.kind}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name: built-in ones first."""
        return tuple(dict.fromkeys((*self.builtin, *self._entries, *self.plugins)))

    def load(self, name: str) -> T:
        """Return the object of a name; import its module if need be.

        Raises:
            UserError: an unknown name, or a plug-in that cannot be imported.
        """
        if name not in self._entries and name in self.builtin:
            importlib.import_module(str(self._home))
        if name not in self._entries and (plugin := self.plugin(name)):
            self._entries[name] = _load(plugin)
        if name not in self._entries:
            raise UserError(self.unknown(name))
        return self._entries[name]

    def facts(self, name: str) -> Mapping[str, Any]:
        """Return the facts of a name. A name that states none has an empty mapping."""
        if name in self._facts:
            return self._facts[name]
        if name in self._declared:
            return self._declared[name]
        point = _points().get(("part", name))
        found = _load(point) if point and self.plugin(name) else {}
        if not isinstance(found, Mapping):
            raise UserError(f"part.{name} of {point} is no mapping of facts to values")
        self._facts[name] = found
        return found

    def plugin(self, name: str) -> Plugin | None:
        """Return the package that a name comes from. None: it is built in, or of this process."""
        plugin = self.plugins.get(name)
        if plugin is not None and (name in self.builtin or plugin.clashes):
            other = "this project" if name in self.builtin else plugin.clashes
            raise UserError(
                f"{plugin.point.name} is of two packages, {plugin} and {other}; uninstall one of "
                "them, or give it another name"
            )
        return plugin

    def unknown(self, name: str) -> str:
        """Return the message for a name that nothing registers."""
        return (
            f'{self.kind} "{name}": there is none of that name'
            f"{nearest(name, self.names)}; there are {', '.join(self.names)}"
        )

    @cached_property
    def _declared(self) -> dict[str, dict[str, Any]]:
        """Facts by name, as the home module's calls of `register` state them."""
        if self._home is None:
            return {}
        source = (_PROJECT / self._home.replace(".", "/")).with_suffix(".py")
        found: dict[str, dict[str, Any]] = {}
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                f"{self._plural}.register"
            ):
                facts = {str(item.arg): ast.literal_eval(item.value) for item in node.keywords}
                found[ast.literal_eval(node.args[0])] = facts
        return found


@lru_cache(maxsize=1)
def _points() -> dict[tuple[str, str], Plugin]:
    """Return the entry points of installed packages by kind and name, without an import."""
    found: dict[tuple[str, str], Plugin] = {}
    for point in entry_points(group=GROUP):
        kind, _, name = point.name.partition(".")
        package = point.dist
        plugin = Plugin(point, package.name if package else "?", package.version if package else "")
        other = found.setdefault((kind, name), plugin)
        if other.point.value != point.value:
            found[kind, name] = replace(other, clashes=str(plugin))
    return found


def _load(plugin: Plugin) -> Any:
    try:
        return plugin.point.load()
    except Exception as error:  # a stranger's module: whatever it raises is a fault of the package
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
