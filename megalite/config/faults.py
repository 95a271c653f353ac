"""Faults of a run file, one line each: the dotted key, the fault, and the remedy."""

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

_PREFIX = 3  # number of equal first letters that is enough to suggest a key


@dataclass(frozen=True)
class ConfigFault:
    """A fault of one key, or of several keys together.

    Attributes:
        keys: the keys. Messages name the first key.
        text: the fault and its remedy, without the key.
    """

    keys: tuple[Key, ...]
    text: str

    def __str__(self) -> str:
        return f"{dotted(self.keys[0])}: {self.text}" if self.keys[0] else self.text


def fault(keys: str, text: str) -> ConfigFault:
    """Return a fault of the dotted keys in `keys`, which are separated by spaces."""
    return ConfigFault(tuple(tuple(key.split(".")) for key in keys.split()), text)


def dotted(key: tuple[str | int, ...]) -> str:
    """Return a key as `data.train[0].path`. Parts that are not identifiers are quoted."""
    words = [
        f"[{part}]" if isinstance(part, int) or part.isdigit()
        else "." + (part if part.isidentifier() else show(part))
        for part in key
    ]  # fmt: skip
    return "".join(words).removeprefix(".")


def show(value: Any) -> str:
    """Return a value as JSON on one line, shortened to 60 characters and safe for a terminal."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def known_keys(section: type[Section] = RunConfig, at: Key = ()) -> dict[Key, FieldInfo]:
    """Return every key of a run file, sections included. Items of a list have no index."""
    fields: dict[Key, FieldInfo] = {}
    for name, field in section.model_fields.items():
        key = (*at, name)
        fields[key] = field
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):  # or a list of sections
                fields |= known_keys(kind, key)
    return fields


def _unknown(loc: tuple[str | int, ...], value: Any = None) -> str:
    """Return the fault of an unknown key, with the first of these suggestions that exists.

    1. the key with the same meaning, if another trainer uses this name
    2. a key with this name in another section
    3. a key with a similar name in this section
    4. a key with a similar name in another section

    Names are compared without their section, because a section's name says nothing about the key.
    """
    *at, name = (part for part in loc if isinstance(part, str))
    answer = foreign_answer(name, at[-1] if at else "")
    if answer:
        return f"unknown key; {answer}{_answers_within(name, value)}"
    if is_secret("x", key=name):
        return (
            "unknown key; remove it, and pass secrets in environment variables such as HF_TOKEN "
            "and WANDB_API_KEY, because every checkpoint contains a copy of the run file"
        )
    keys = known_keys()
    siblings = [key[-1] for key in keys if key[:-1] == tuple(at)]
    elsewhere = [key for key in keys if key[-1] == name]
    hint = ""
    if elsewhere:  # suggest the key whose sections match best
        best = max(elsewhere, key=lambda key: sum(a == b for a, b in zip(key, at, strict=False)))
        hint = f'; did you mean "{dotted(best)}"?'
    sections = [section for section, names in KNOWN.items() if name in names]
    if not hint and len(sections) == 1:
        deepspeed_key = ".".join(part for part in ("deepspeed", sections[0], name) if part)
        hint = f'; did you mean "{deepspeed_key}"?'
    hint = hint or nearest(name, siblings)
    if not hint and len(name) >= _PREFIX and "_" not in name:
        matches = [f'"{s}"' for s in siblings if s[:_PREFIX] == name[:_PREFIX]]
        choice = matches[0] if len(matches) == 1 else f"one of {', '.join(matches)}"
        hint = f"; did you mean {choice}?" if matches else ""
    if not hint:
        by_name = {key[-1]: key for key in reversed(keys)}
        hint = nearest(name, by_name, shown=lambda match: dotted(by_name[match]))
    hint = hint or "; remove it, or write one of " + ", ".join(siblings)
    return f"unknown key{hint}{_answers_within(name, value)}"


def _answers_within(section: str, value: Any) -> str:
    """Return the answers to the names of other trainers in an unknown section."""
    if not isinstance(value, dict):
        return ""
    answers = [(key, foreign_answer(key, section)) for key in value]
    return "".join(f"; {dotted((key,))}: {answer}" for key, answer in answers if answer)


def schema_faults(raw: dict[str, Any]) -> tuple[RunConfig, list[ConfigFault]]:
    """Check every field of a run file.

    Returns:
        the config and its faults. Defaults and examples replace invalid values, so that rules
        between the other fields can still be checked.
    """
    repaired = copy.deepcopy(raw)
    faults: list[ConfigFault] = []
    for attempt in range(8):  # a missing section is added first, then its required keys
        try:
            return RunConfig.model_validate(repaired), faults
        except ValidationError as error:
            details = error.errors(include_url=False)
        if attempt == 0:
            faults = [_describe(item, raw) for item in details if _is_original(item, details)]
        for item in sorted(details, key=lambda item: -len(item["loc"])):
            _repair(repaired, item["loc"])
    raise AssertionError(f"a run file could not be repaired: {details}")


def describe_errors(error: ValidationError, section: str) -> str:
    """Return the faults of a section of a run file, with keys relative to the section."""
    details = error.errors(include_url=False)
    faults = [_describe({**item, "loc": (section, *item["loc"])}, {}) for item in details]
    return "; ".join(str(fault).removeprefix(f"{section}.") for fault in faults)


def _is_original(item: ErrorDetails, details: list[ErrorDetails]) -> bool:
    """Return whether an error is not merely the consequence of another error."""
    if item["type"] == "default_factory_not_called":
        return False
    at = item["loc"]
    deeper = [other["loc"] for other in details if len(other["loc"]) > len(at)]
    return item["type"] != "too_short" or not any(loc[: len(at)] == at for loc in deeper)


def _field(key: tuple[str | int, ...]) -> FieldInfo | None:
    return known_keys().get(tuple(part for part in key if isinstance(part, str)))


def _repair(raw: dict[str, Any], loc: tuple[str | int, ...]) -> None:
    """Remove the value at `loc`. If the key is required, insert its example instead."""
    while loc and isinstance(loc[-1], int):
        loc = loc[:-1]
    parent: Any = raw
    for part in loc[:-1]:
        try:
            # a section that fine-tuning sets may be absent
            parent = parent.setdefault(part, {}) if isinstance(parent, dict) else parent[part]
        except (IndexError, TypeError):
            return
    if not isinstance(parent, dict):
        return
    parent.pop(loc[-1], None)
    field = _field(loc)
    if field is not None and field.is_required():
        parent[loc[-1]] = copy.deepcopy(field.examples[0]) if field.examples else {}


_EXPECTED = {
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
    "too_short": "a list of {min_length} or more items",
    "too_long": "a list of {max_length} items",
    "literal_error": "one of {expected}",
    "unknown_name": "one of {names}",
    "value_error": "{error}",
}


def _describe(item: ErrorDetails, raw: Mapping[str, Any]) -> ConfigFault:
    """Return the fault that a schema error describes."""
    loc, kind, value = item["loc"], item["type"], item["input"]
    key = tuple(str(part) for part in loc)
    field = _field(loc)
    if kind == "extra_forbidden" or field is None:
        return ConfigFault((key,), _unknown(loc, value))
    if kind == "missing" and not isinstance(loc[-1], int):
        example = field.examples[0] if field.examples else {}
        remedy = f"add it, for example {show({loc[-1]: example})[1:-1]}"
        if loc == ("model",) and "finetune" in value:
            remedy = "add this section, or name a model to start from with --init-from"
        return ConfigFault((key,), f"is missing; {remedy}")
    expected = _EXPECTED.get(kind, "another value").format(**item.get("ctx", {}))
    if kind == "literal_error":
        expected = expected.replace("'", "").replace(" or ", ", ")
    if kind == "missing" and isinstance(loc[-1], int):  # an item of a list of fixed length
        key = key[:-1]
        expected = f"a list of {loc[-1] + 1} items"
    allowed = [str(choice) for choice in getattr(field.annotation, "__args__", ())]
    missing = None
    if kind == "literal_error" and isinstance(loc[-1], int):  # an item of a list
        allowed = re.findall(r"'([^']+)'", item["ctx"]["expected"])
    if kind == "unknown_name":
        allowed = item["ctx"]["names"].split(", ")
        missing = missing_plugin(f"{item['ctx']['kind']}.{value}", raw)
    remedy = missing or _remedy(kind, value, field, allowed)
    return ConfigFault((key,), f"expected {expected}, got {show(value)}; {remedy}")


def _remedy(kind: str, value: Any, field: FieldInfo, allowed: list[str]) -> str:
    """Return the remedy for an invalid value.

    Args:
        allowed: the allowed values, if the key has a fixed set of values.
    """
    if kind in ("literal_error", "unknown_name") and isinstance(value, str):
        hint = nearest(value, allowed).removeprefix("; ")
        if hint:
            return hint
    if value is None and not field.is_required():
        return "remove it to use the default"
    if isinstance(value, str) and kind in ("int_type", "float_type", "bool_type"):
        with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
            if math.isfinite(json.loads(value)):
                return "write it without quotes"
    if isinstance(value, float) and kind == "int_type" and value.is_integer():
        return f"write {int(value)}"
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return f'write "{show(value)}" in quotes'
    return f"correct the value; its meaning: {field.description}"
