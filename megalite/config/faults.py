"""A fault of a run file as one line: the dotted key, what was asked and found, what to do."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megalite.config.schema import RunConfig, Section
from megalite.errors import nearest

Key = tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """`keys` are what it is about, the first of them the one to look at; `text` says the rest."""

    keys: tuple[Key, ...]
    text: str

    def __str__(self) -> str:
        return f"{dotted(self.keys[0])}: {self.text}" if self.keys[0] else self.text


def fault(keys: str, text: str) -> Fault:
    """A fault about one or more dotted keys, separated by spaces."""
    return Fault(tuple(tuple(key.split(".")) for key in keys.split()), text)


def dotted(key: tuple[str | int, ...]) -> str:
    """`data.train[0].path`; a part that is no plain word is quoted, and a long one cut."""
    words = [
        f"[{part}]" if isinstance(part, int) or part.isdigit()
        else "." + (part if part.isidentifier() else show(part))
        for part in key
    ]  # fmt: skip
    return "".join(words).removeprefix(".")


def show(value: Any) -> str:
    """A value as JSON has it, on one line, cut where it is long, safe for a terminal."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def known_keys() -> list[str]:
    """Every dotted key of a run file, sections included."""
    return [".".join(key) for key, _ in _walk(RunConfig)]


def _walk(model: type[BaseModel], at: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield (*at, name), field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _walk(field.annotation, (*at, name))


def unknown(key: tuple[str | int, ...]) -> str:
    """What to say to a key nobody knows: the nearest of its section, or of the whole file."""
    name = str(key[-1])
    section = [k for k, _ in _walk(RunConfig) if k[:-1] == key[:-1]]
    hint = nearest(name, [k[-1] for k in section])
    if not hint:
        elsewhere = [k for k, _ in _walk(RunConfig) if k[-1] == name]
        hint = f'; did you mean "{dotted(elsewhere[0])}"?' if elsewhere else ""
    if not hint:
        hint = nearest(".".join(str(part) for part in key), known_keys())
    if not hint and len(key) > 1 and section:
        hint = f"; known here: {', '.join(k[-1] for k in section)}"
    return f"unknown key{hint or '; take it out'}"


def schema_faults(raw: dict[str, Any]) -> tuple[RunConfig, list[Fault]]:
    """Check every field of a run file.

    Returns the config and its faults. Where there are faults the config is mended, with defaults
    and examples in the places at fault, so that the rules between fields can still be asked
    about the rest of it.
    """
    mended = copy.deepcopy(raw)
    faults: list[Fault] = []
    for round in range(8):  # an absent section is mended first, then what it must contain
        try:
            return RunConfig.model_validate(mended), faults
        except ValidationError as error:
            details = error.errors(include_url=False)
        if round == 0:
            faults = [_describe(item) for item in details if _speaks(item, details)]
        for item in sorted(details, key=lambda item: -len(item["loc"])):
            _mend(mended, item["loc"])
    raise AssertionError(f"a run file could not be mended: {details}")


def _speaks(item: ErrorDetails, details: list[ErrorDetails]) -> bool:
    """Whether an error is the user's own and not the echo of another."""
    if item["type"] == "default_factory_not_called":
        return False
    inner = [other for other in details if len(other["loc"]) > len(item["loc"])]
    at = item["loc"]
    return item["type"] != "too_short" or not any(o["loc"][: len(at)] == at for o in inner)


def _field(key: tuple[str | int, ...]) -> FieldInfo | None:
    model: type[Section] | None = RunConfig
    field: FieldInfo | None = None
    for part in key:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model is not None else None
        if field is None:
            return None
        model = _section_of(field)
    return field


def _section_of(field: FieldInfo) -> type[Section] | None:
    """The section a field holds, itself or in a list."""
    for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _mend(raw: dict[str, Any], loc: tuple[str | int, ...]) -> None:
    """Take the value at `loc` out, or put an example in where one is needed."""
    while loc and isinstance(loc[-1], int):
        loc = loc[:-1]
    owner: Any = raw
    for part in loc[:-1]:
        try:
            owner = owner[part]
        except (KeyError, IndexError, TypeError):
            return
    if not isinstance(owner, dict):
        return
    owner.pop(loc[-1], None)
    field = _field(loc)
    if field is not None and field.is_required():
        owner[loc[-1]] = copy.deepcopy(field.examples[0]) if field.examples else {}


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "tuple_type": "a list [...]",
    "dict_type": "a section {...}",
    "model_type": "a section {...}",
    "model_attributes_type": "a section {...}",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "a number above {}"),
    "greater_than_equal": ("ge", "a number of {} or more"),
    "less_than": ("lt", "a number below {}"),
    "less_than_equal": ("le", "a number of {} or less"),
    "too_short": ("min_length", "a list of {} or more"),
    "too_long": ("max_length", "a list of {}"),
    "string_too_short": ("min_length", "text of {} character or more"),
}


def _describe(item: ErrorDetails) -> Fault:
    loc, kind, found = item["loc"], item["type"], item["input"]
    key = tuple(str(part) for part in loc)
    field = _field(loc)
    if kind == "extra_forbidden":
        return Fault((key,), unknown(loc))
    context = item.get("ctx", {})
    meaning = (
        f" ({field.description.split(':')[0].rstrip('.')})" if field and field.description else ""
    )
    if kind == "missing":
        example = field.examples[0] if field is not None and field.examples else {}
        return Fault(
            (key,), f"is missing{meaning}; write for example {show(loc[-1])}: {show(example)}"
        )
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        expected = words.format(context[name])
    elif kind == "literal_error":
        expected = "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    else:
        expected = _KINDS.get(kind, item["msg"])
    return Fault((key,), f"expected {expected}, found {show(found)}{_remedy(kind, found, field)}")


def _remedy(kind: str, found: Any, field: FieldInfo | None) -> str:
    if kind == "literal_error" and isinstance(found, str) and field is not None:
        return nearest(found, [str(word) for word in getattr(field.annotation, "__args__", ())])
    if found is None and field is not None and not field.is_required():
        return "; leave the key out to have the default"
    if isinstance(found, str) and kind in ("int_type", "float_type", "bool_type"):
        return "; write it without quotes"
    if isinstance(found, bool) and kind in ("int_type", "float_type"):
        return "; write a number"
    if kind == "string_type" and not isinstance(found, (dict, list)):
        return f'; write "{found}" in quotes' if found is not None else "; write it in quotes"
    if field is not None and field.description:
        return f"; it means: {field.description}"
    return ""
