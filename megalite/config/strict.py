"""Parse strict JSON, or YAML with the same values, and report faults with their lines."""

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
TOO_DEEP = f"lists and sections are nested more than {_DEPTH} deep; remove some levels"
_STAND_IN = 0.5  # replaces an invalid number; within every field's bounds, so reported once
_INTEGER_LIMIT = 2**63  # end of the signed 64-bit range


def read_strict_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the faults of the file, without its name.
    """
    value, notes = read_value(path)
    if not isinstance(value, dict):
        notes.append(f"expected one JSON object {{...}}, got {show(value)}")
    if notes:
        raise ConfigError(notes)
    assert isinstance(value, dict)
    return value


def read_value(path: Path) -> tuple[Any, list[str]]:
    """Return the value in a file, JSON or YAML by its name, and its faults (`parse_strict`).

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file cannot be parsed. The message lacks the file's name.
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
            "fix that line (JSON has no comments and no comma before a closing bracket)"
        ) from None
    except RecursionError:
        raise ConfigError(TOO_DEEP) from None
    if too_deep(value):
        raise ConfigError([*notes, TOO_DEEP])
    return value, notes


def write_value(path: Path, value: dict[str, Any]) -> None:
    """Write a run file, as YAML if its name ends in .yaml or .yml, otherwise as JSON."""
    if is_yaml(path):
        from megalite.config.yaml_text import format_yaml

        files.write_atomic(path, format_yaml(value))
    else:
        files.write_json(path, value)


def is_yaml(path: Path) -> bool:
    """Return whether a run file is YAML, judged by its name."""
    return path.suffix.lower() in (".yaml", ".yml")


def parse_mapping(raw: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Return a mapping as if it were read from a JSON file, and its faults (`parse_strict`).

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
            f"not JSON: {error}; use only text, numbers, true, false, null, lists and mappings"
        ) from None
    return value, [*notes, TOO_DEEP] if too_deep(value) else notes


def _plain(value: Any) -> Any:
    """Convert a value that `json` cannot write."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def too_deep(value: Any) -> bool:
    """Return whether lists and sections are nested too deep for the recursions that follow."""
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
    """Remove keys that are not Unicode text (half a surrogate pair), in place, and note them.

    Values are only checked in the `deepspeed` section. The schema checks all others.
    """
    if isinstance(value, list):
        for item in value:
            drop_halves(item, notes, all_values=all_values)
    if not isinstance(value, dict):
        return
    for key, item in list(value.items()):
        if _is_half(key) or (all_values and _is_half(item)):
            notes.append(
                f"{show(key if _is_half(key) else item)}: half a surrogate pair is not text; write "
                "the whole character, or remove it"
            )
            del value[key]
        else:
            drop_halves(item, notes, all_values=all_values or key == "deepspeed")


def _is_half(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value)


def parse_strict(text: str, *, yaml: bool = False) -> tuple[Any, list[str]]:
    """Return the value of a JSON text, and its faults: duplicate keys, numbers out of range.

    Args:
        yaml: if true, the text is YAML.
    Raises:
        json.JSONDecodeError, RecursionError: the text is not JSON.
        ConfigError: the text is not YAML, or uses a feature that JSON lacks.
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
    """Checks of keys and numbers while a file is parsed; parsing continues after a fault.

    Attributes:
        notes: the faults so far.
        prefix: text to put before the next fault, such as its line.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.prefix = ""

    def section(self, items: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return a section with these keys and values."""
        result: dict[str, Any] = {}
        for key, value in items:
            self.add(result, key, value)
        return result

    def add(self, section: dict[str, Any], key: str, value: Any) -> None:
        """Add a key to its section. A second value of a key replaces the first and is noted."""
        if key in section:
            self._note(
                f"{show(key)} occurs twice in one section, with {show(section[key])} and "
                f"{show(value)}; remove one"
            )
        section[key] = value

    def constant(self, word: str) -> float:
        """Note a number that JSON lacks (NaN, Infinity), and return a substitute."""
        self._note(f"{word} is not a JSON number; write a finite number or null")
        return _STAND_IN

    def real(self, digits: str) -> float:
        """Return the number that `digits` spell, or a substitute if it is too large."""
        value = float(digits)
        if not math.isfinite(value):
            self._note(f"{show(digits)} is out of range; write a number below 1e308")
        return value if math.isfinite(value) else _STAND_IN

    def integer(self, digits: str) -> int:
        """Return the whole number that `digits` spell, or a substitute if it is too large."""
        value = int(digits) if len(digits) < 25 else _INTEGER_LIMIT
        if not -_INTEGER_LIMIT <= value < _INTEGER_LIMIT:
            self._note(f"{show(digits)} is out of range; write a whole number below 2^63")
            return 1  # within the bounds of every field, so that no other fault follows
        return value

    def _note(self, fault: str) -> None:
        self.notes.append(f"{self.prefix}{fault}")
