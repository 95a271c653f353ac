"""A fault of a run file as one line: the dotted key, the value, and what to do."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megalite.config.deepspeed_tables import KNOWN
from megalite.config.fields import Section
from megalite.config.foreign import foreign_answer
from megalite.config.names import missing_plugin
from megalite.config.schema import RunConfig
from megalite.errors import nearest
from megalite.log import is_secret

Key = tuple[str, ...]

_BEGUN = 3  # letters that identify the key that was begun


@dataclass(frozen=True)
class Fault:
    """`keys` are what it is about, the first of them the one to look at; `text` says the rest."""

    keys: tuple[Key, ...]
    text: str

    def __str__(self) -> str:
        return f"{dotted(self.keys[0])}: {self.text}" if self.keys[0] else self.text


def fault(keys: str, text: str) -> Fault:
    """Return a fault about one or more dotted keys, separated by spaces."""
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
    """Return a value as JSON has it, on one line, cut if it is long, safe for a terminal."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def known_keys(section: type[Section] = RunConfig, at: Key = ()) -> dict[Key, FieldInfo]:
    """Return every key of a run file, sections included; a list's items stand without
    their index.
    """
    found: dict[Key, FieldInfo] = {}
    for name, field in section.model_fields.items():
        key = (*at, name)
        found[key] = field
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):  # itself, or in a list
                found |= known_keys(kind, key)
    return found


def _unknown(loc: tuple[str | int, ...], found: Any = None) -> str:
    """Return what to say about an unknown key.

    A name of another trainer is answered with the key that has its meaning. Else it is the key of
    that name in another section, or the nearest name of its section, or of the whole file. The
    section's name says nothing about a key, so names alone are compared.
    """
    *at, name = (part for part in loc if isinstance(part, str))
    answer = foreign_answer(name, at[-1] if at else "")
    if answer:
        return f"unknown key; {answer}{_answers_within(name, found)}"
    if is_secret("x", key=name):
        return (
            "unknown key; remove it: secrets are passed in environment variables such as "
            "HF_TOKEN and WANDB_API_KEY, since every checkpoint keeps a copy of the run file"
        )
    known = known_keys()
    siblings = [key[-1] for key in known if key[:-1] == tuple(at)]
    elsewhere = [key for key in known if key[-1] == name]
    hint = ""
    if elsewhere:  # the one that shares most of the way to it
        same = max(elsewhere, key=lambda key: sum(a == b for a, b in zip(key, at, strict=False)))
        hint = f'; did you mean "{dotted(same)}"?'
    homes = [home for home, keys in KNOWN.items() if name in keys]
    if not hint and len(homes) == 1:
        theirs = ".".join(part for part in ("deepspeed", homes[0], name) if part)
        hint = f'; did you mean "{theirs}"?'
    hint = hint or nearest(name, siblings)
    if not hint and len(name) >= _BEGUN and "_" not in name:
        begun = [f'"{s}"' for s in siblings if s[:_BEGUN] == name[:_BEGUN]]
        few = begun[0] if len(begun) == 1 else f"one of {', '.join(begun)}"
        hint = f"; did you mean {few}?" if begun else ""
    if not hint:
        by_name = {key[-1]: key for key in reversed(known)}
        hint = nearest(name, by_name, shown=lambda one: dotted(by_name[one]))
    hint = hint or "; remove it, or write one of " + ", ".join(siblings)
    return f"unknown key{hint}{_answers_within(name, found)}"


def _answers_within(section: str, found: Any) -> str:
    """Return what names of other trainers within an unknown section are here."""
    if not isinstance(found, dict):
        return ""
    answers = [(key, foreign_answer(key, section)) for key in found]
    return "".join(f"; {dotted((key,))}: {answer}" for key, answer in answers if answer)


def schema_faults(raw: dict[str, Any]) -> tuple[RunConfig, list[Fault]]:
    """Check every field of a run file.

    Returns the config and its faults. If there are faults the config is fixed, with defaults
    and examples in the places at fault, so that the rules between fields can still be asked
    about the rest of it.
    """
    mended = copy.deepcopy(raw)
    faults: list[Fault] = []
    for round in range(8):  # an absent section is fixed first, then what it must contain
        try:
            return RunConfig.model_validate(mended), faults
        except ValidationError as error:
            details = error.errors(include_url=False)
        if round == 0:
            faults = [_describe(item, raw) for item in details if _speaks(item, details)]
        for item in sorted(details, key=lambda item: -len(item["loc"])):
            _mend(mended, item["loc"])
    raise AssertionError(f"a run file could not be fixed: {details}")


def describe_errors(error: ValidationError, section: str) -> str:
    """Return what is wrong with a section of a run file, each key by its name within it."""
    details = error.errors(include_url=False)
    faults = [_describe({**item, "loc": (section, *item["loc"])}, {}) for item in details]
    return "; ".join(str(fault).removeprefix(f"{section}.") for fault in faults)


def _speaks(item: ErrorDetails, details: list[ErrorDetails]) -> bool:
    """Return whether an error is the user's own and not the echo of another."""
    if item["type"] == "default_factory_not_called":
        return False
    inner = [other for other in details if len(other["loc"]) > len(item["loc"])]
    at = item["loc"]
    return item["type"] != "too_short" or not any(o["loc"][: len(at)] == at for o in inner)


def _field(key: tuple[str | int, ...]) -> FieldInfo | None:
    return known_keys().get(tuple(part for part in key if isinstance(part, str)))


def _mend(raw: dict[str, Any], loc: tuple[str | int, ...]) -> None:
    """Remove the value at `loc`, or insert an example if one is required."""
    while loc and isinstance(loc[-1], int):
        loc = loc[:-1]
    owner: Any = raw
    for part in loc[:-1]:
        try:
            # a section that fine-tuning fills in need not be there
            owner = owner.setdefault(part, {}) if isinstance(owner, dict) else owner[part]
        except (IndexError, TypeError):
            return
    if not isinstance(owner, dict):
        return
    owner.pop(loc[-1], None)
    field = _field(loc)
    if field is not None and field.is_required():
        owner[loc[-1]] = copy.deepcopy(field.examples[0]) if field.examples else {}


_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list [...]",
    "dict_type": "a section {{...}}",
    "model_type": "a section {{...}}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of {ge:g} or more",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of {le:g} or less",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length}",
    "literal_error": "one of {expected}",
    "unknown_name": "one of {names}",
    "value_error": "{error}",
}


def _describe(item: ErrorDetails, raw: Mapping[str, Any]) -> Fault:
    loc, kind, found = item["loc"], item["type"], item["input"]
    key = tuple(str(part) for part in loc)
    field = _field(loc)
    if kind == "extra_forbidden" or field is None:
        return Fault((key,), _unknown(loc, found))
    if kind == "missing" and not isinstance(loc[-1], int):
        example = field.examples[0] if field.examples else {}
        remedy = f"write for example {show({loc[-1]: example})[1:-1]}"
        if loc == ("model",) and "finetune" in found:
            remedy = "write one, or name a model to start from with --init-from"
        return Fault((key,), f"is missing; {remedy}")
    expected = _KINDS.get(kind, "another value").format(**item.get("ctx", {}))
    if kind == "literal_error":
        expected = expected.replace("'", "").replace(" or ", ", ")
    if kind == "missing" and isinstance(loc[-1], int):  # an item of a list of fixed length
        key = key[:-1]
        expected = f"a list of {loc[-1] + 1}"
    words = [str(word) for word in getattr(field.annotation, "__args__", ())]
    missing = None
    if kind == "literal_error" and isinstance(loc[-1], int):  # an item of a list
        words = re.findall(r"'([^']+)'", item["ctx"]["expected"])
    if kind == "unknown_name":
        words = item["ctx"]["names"].split(", ")
        missing = missing_plugin(f"{item['ctx']['kind']}.{found}", raw)
    remedy = missing or _remedy(kind, found, field, words)
    return Fault((key,), f"expected {expected}, found {show(found)}; {remedy}")


def _remedy(kind: str, found: Any, field: FieldInfo, words: list[str]) -> str:
    """Return what to do about a value of the wrong kind.

    Args:
        words: the values there are, of a key that has few.
    """
    if kind in ("literal_error", "unknown_name") and isinstance(found, str):
        hint = nearest(found, words).removeprefix("; ")
        if hint:
            return hint
    if found is None and not field.is_required():
        return "remove it to have the default"
    if isinstance(found, str) and kind in ("int_type", "float_type", "bool_type"):
        with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
            if math.isfinite(json.loads(found)):
                return "write it without quotes"
    if isinstance(found, float) and kind == "int_type" and found.is_integer():
        return f"write {int(found)}"
    if kind == "string_type" and isinstance(found, (bool, int, float)):
        return f'write "{show(found)}" in quotes'
    return f"it is: {field.description}"
