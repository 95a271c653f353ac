"""Strict JSON, or YAML with the same values: anything else is a fault with its line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from megalite import files
from megalite.config.faults import show
from megalite.errors import ConfigError

_DEPTH = 30  # levels of nesting; a run file has four
TOO_DEEP = f"sections within sections over {_DEPTH} deep; nothing that is read here nests so"
_STAND_IN = 0.5  # for a number that is none: within every field's bounds, so reported once
_INTEGER_LIMIT = 2**63  # what a signed 64-bit number holds


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: its faults, without its name.
    """
    value, notes = read_value(path)
    if not isinstance(value, dict):
        notes.append(f"expected one JSON object {{...}}, found {show(value)}")
    if notes:
        raise ConfigError(notes)
    assert isinstance(value, dict)
    return value


def read_value(path: Path) -> tuple[Any, list[str]]:
    """Return what a file holds, and what `parse_strict` notes about it.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: why it is not JSON, or YAML if its name says so, without its name.
    """
    try:
        data = files.read_regular(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot be read: {reason}; expected a file in JSON or YAML") from None
    if data.startswith(b"\xef\xbb\xbf"):
        raise ConfigError("line 1 column 1: a byte order mark; save as UTF-8 without BOM")
    try:
        value, notes = parse_strict(data.decode("utf-8"), yaml=is_yaml(path))
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        line = before.count("\n") + 1
        column = len(before) - before.rfind("\n")
        byte = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise ConfigError(f"line {line} column {column}: {byte}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"line {error.lineno} column {error.colno}: not JSON: {error.msg}; "
            "fix it there (JSON has no comments and no comma before a closing bracket)"
        ) from None
    except RecursionError:
        raise ConfigError(TOO_DEEP) from None
    if too_deep(value):
        raise ConfigError([*notes, TOO_DEEP])
    return value, notes


def write_value(path: Path, value: dict[str, Any]) -> None:
    """Write a run file, in YAML if its name says so, else in JSON."""
    if is_yaml(path):
        from megalite.config.yaml_text import format_yaml

        files.write_atomic(path, format_yaml(value))
    else:
        files.write_json(path, value)


def is_yaml(path: Path) -> bool:
    """Return whether a run file is YAML, by its name."""
    return path.suffix.lower() in (".yaml", ".yml")


def parse_mapping(raw: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Return a mapping as a JSON file of it would be read, and what `parse_strict` notes about it.

    Tuples become lists, and paths become text.

    Raises:
        ConfigError: the mapping has a value that JSON cannot express.
    """
    try:
        value, notes = parse_strict(json.dumps(raw, default=_plain))
    except RecursionError:
        raise ConfigError(TOO_DEEP) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"not JSON: {error}; use text, numbers, true, false, null, lists and mappings"
        ) from None
    return value, [*notes, TOO_DEEP] if too_deep(value) else notes


def _plain(value: Any) -> Any:
    """Return a value that `json` cannot write, as one that it can."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def too_deep(value: Any) -> bool:
    """Return whether lists and sections nest so deep that the recursions to come could not end
    well.
    """
    level = [value]
    for _ in range(_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def drop_halves(value: Any, notes: list[str], *, all_values: bool = False) -> None:
    """Take keys out that are no Unicode text (half a surrogate pair), in place, and note them.

    A value of a known field is checked by the schema; those of `deepspeed` have none.
    """
    if isinstance(value, list):
        for item in value:
            drop_halves(item, notes, all_values=all_values)
    if not isinstance(value, dict):
        return
    for key, item in list(value.items()):
        if _is_half(key) or (all_values and _is_half(item)):
            notes.append(
                f"{show(key if _is_half(key) else item)}: half a surrogate pair is no text; write "
                "the whole character, or remove it"
            )
            del value[key]
        else:
            drop_halves(item, notes, all_values=all_values or key == "deepspeed")


def _is_half(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value)


def parse_strict(text: str, *, yaml: bool = False) -> tuple[Any, list[str]]:
    """Return the value of a JSON text, and notes of what a sound file would not have.

    Args:
        yaml: if true, the text is YAML.
    Raises:
        json.JSONDecodeError, RecursionError: it is not JSON.
        ConfigError: it is not YAML, or has what JSON lacks.
    """
    checks = ValueChecks()
    if yaml:
        from megalite.config.yaml_text import parse_yaml  # few runs need it

        return parse_yaml(text, checks), checks.notes
    value = json.loads(
        text,
        object_pairs_hook=checks.section,
        parse_constant=checks.constant,
        parse_float=checks.real,
        parse_int=checks.integer,
    )
    return value, checks.notes


class ValueChecks:
    """Checks of keys and numbers while a file is read; a fault stops nothing.

    Attributes:
        notes: the faults.
        place: text to put before the next fault, such as its line.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.place = ""

    def section(self, items: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return the section of some keys and values."""
        result: dict[str, Any] = {}
        for key, value in items:
            self.add(result, key, value)
        return result

    def add(self, section: dict[str, Any], key: str, value: Any) -> None:
        """Add a key to its section; a second value replaces the first."""
        if key in section:
            self._note(
                f"{show(key)} is written twice in one section, as {show(section[key])} and as "
                f"{show(value)}; keep one"
            )
        section[key] = value

    def constant(self, word: str) -> float:
        """Return a finite number in place of an infinite one."""
        self._note(f"{word} is not a JSON number; write a finite number or null")
        return _STAND_IN

    def real(self, digits: str) -> float:
        """Return the number of some digits, or a finite one in its place."""
        value = float(digits)
        if not math.isfinite(value):
            self._note(f"{show(digits)} is out of a number's range; write one below 1e308")
        return value if math.isfinite(value) else _STAND_IN

    def integer(self, digits: str) -> int:
        """Return the whole number of some decimal digits, or a small one in its place."""
        value = int(digits) if len(digits) < 25 else _INTEGER_LIMIT
        if not -_INTEGER_LIMIT <= value < _INTEGER_LIMIT:
            self._note(f"{show(digits)} is out of range; whole numbers end at 2^63 - 1")
            return 1  # within the bounds of every field, so that nothing else is said of it
        return value

    def _note(self, fault: str) -> None:
        self.notes.append(f"{self.place}{fault}")
