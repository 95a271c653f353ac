"""From a run file to a `RunConfig`: read, extend, set, check, and name every fault at once.

A run file is strict JSON. `"extends": "base.json"` (relative to the file that says so) is read
first and merged key by key; a list replaces a list. `--set a.b=c` comes last. A file that is not
where it is said to be is looked for among those that ship, with or without `configs/` before its
name. Nothing here runs code, and no input ends in anything but a `RunConfig` or a `ConfigError`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megalite.config.deepspeed_keys import deepspeed_faults
from megalite.config.faults import Fault, Key, schema_faults, show
from megalite.config.rules import rule_faults
from megalite.config.schema import RunConfig
from megalite.errors import ConfigError
from megalite.log import logger

# beside the package in a checkout, within it where it is installed (pyproject.toml)
_PACKAGE = Path(__file__).parents[1]
SHIPPED = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"

Origins = dict[Key, str]  # what to put before a fault: the file, or --set

_DEPTH = 30  # levels of nesting; a run file has four
_TOO_DEEP = f"sections within sections over {_DEPTH} deep; this is no run file"
_STAND_IN = 0.5  # for a number that is none: within every field's bounds, so told once
_INTEGER_LIMIT = 2**63  # what a signed 64-bit number holds


def load_config(
    path: str | Path, sets: Sequence[str] = (), *, model: Mapping[str, Any] | None = None
) -> RunConfig:
    """The checked run file at `path`, with `sets` (each `a.b=c`) laid over it.

    Args:
        model: what of the model section holds where the file says nothing.

    Raises:
        ConfigError: every fault of the file, of the files it extends, of `sets` and of rules
            between fields, one line each.
    """
    faults: list[str] = []
    raw: dict[str, Any] = {}
    origins: Origins = {}
    if model is not None:
        _merge(raw, {"model": model}, "the model to start from: ", origins)
    found = find_file(path)
    if found != Path(path):
        logger.info("%s is not here: taken from %s", path, found)
    for file, content in reversed(_read_chain(found, faults)):
        _merge(raw, content, f"{file}: ", origins)
    _apply_sets(raw, sets, faults, origins)
    return _check(raw, str(path), faults, origins)


def find_file(name: str | Path, folder: Path = Path()) -> Path:
    """Where a run file is: as it is written, from `folder` on, else among those that ship."""
    path = folder / name
    with suppress(OSError, ValueError):  # names that no file can have
        shipped = SHIPPED / str(name).removeprefix("configs/")
        if not path.exists() and ".." not in shipped.parts and shipped.is_file():
            return shipped
    return path


def section_changes(sets: Sequence[str]) -> dict[str, Any]:
    """What `--set` changes, as the sections of a run file."""
    raw: dict[str, Any] = {}
    _apply_sets(raw, sets, [], {})
    return raw


def find_run(path: str | Path, sets: Sequence[str] = ()) -> Path | None:
    """The run folder that a run file means, whatever else may be wrong with it."""
    faults: list[str] = []
    raw: dict[str, Any] = {}
    for _, content in reversed(_read_chain(find_file(path), faults)):
        _merge(raw, content, "", {})
    _apply_sets(raw, sets, faults, {})
    logging, name = raw.get("logging", {}), raw.get("name")
    directory = logging.get("directory", "runs") if isinstance(logging, dict) else None
    if faults or not isinstance(directory, str) or not isinstance(name, str):
        return None
    return Path(directory) / name


def parse_config(raw: Mapping[str, Any], source: str = "the run file") -> RunConfig:
    """`load_config` for a run file that is already parsed, such as one kept in a manifest."""
    return _check(copy.deepcopy(dict(raw)), source, [], {})


def _check(raw: dict[str, Any], source: str, faults: list[str], origins: Origins) -> RunConfig:
    raw.pop("$schema", None)  # an editor's, not ours
    config, found = schema_faults(raw)
    faulty = [fault.keys[0] for fault in found]
    for fault in [*rule_faults(config), *deepspeed_faults(config)]:
        # a rule about a key that is itself at fault would only repeat it
        if not any(_overlap(key, bad) for key in fault.keys for bad in faulty):
            found.append(fault)
    faults += [f"{_origin(fault, source, origins)}{fault}" for fault in found]
    if faults:
        raise ConfigError(faults)
    return config


def _overlap(key: Key, other: Key) -> bool:
    length = min(len(key), len(other))
    return key[:length] == other[:length]


def _origin(fault: Fault, source: str, origins: Origins) -> str:
    """What to put before a fault: where its first key was written, else the run file."""
    key = fault.keys[0]
    while key and key not in origins and any(part.isdigit() for part in key):
        key = key[:-1]  # into a list, which is written whole
    return origins.get(key, f"{source}: ")


# --- files -----------------------------------------------------------------------------------


def _read_chain(path: Path, faults: list[str]) -> list[tuple[Path, dict[str, Any]]]:
    """The file, the one it extends, and so on; a link that leads nowhere ends the list."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen: list[Path] = []
    while True:
        identity = _resolve(path)
        if identity in seen:
            loop = " -> ".join(str(file) for file, _ in chain) + f" -> {path}"
            faults.append(f"{chain[-1][0]}: extends goes in a circle: {loop}; take one link out")
            return chain
        seen.append(identity)
        content = _read_file(path, chain[-1][0] if chain else None, faults)
        parent = content.pop("extends", None) if "extends" in content else ""
        chain.append((path, content))
        if parent == "":
            return chain
        if not isinstance(parent, str) or not parent.isprintable():
            faults.append(
                f"{path}: extends: expected one path as text, found {show(parent)}; "
                'write "extends": "base.json", relative to this file'
            )
            return chain
        path = find_file(parent, path.parent)


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return path


def _read_file(path: Path, asked_by: Path | None, faults: list[str]) -> dict[str, Any]:
    """One file's object.

    Raises:
        ConfigError: why there is none, after the faults so far.
    """

    def fail(text: str) -> ConfigError:
        return ConfigError([*faults, f"{path}: {text}"])

    by = f" (extended by {asked_by})" if asked_by else ""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError("not a regular file")  # reading a pipe would wait for ever
        data = path.read_bytes()
    except FileNotFoundError:
        raise fail(f"no such run file{by}; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise fail(f"cannot be read{by}: {reason}; expected a JSON file") from None
    if data.startswith(b"\xef\xbb\xbf"):
        raise fail("line 1 column 1: a byte order mark; save as UTF-8 without BOM")
    try:
        value, notes = _parse(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        byte = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise fail(f"line {line} column {column}: {byte}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise fail(
            f"line {error.lineno} column {error.colno}: not JSON: {error.msg}; "
            "mend it there (JSON has no comments and no comma before a closing bracket)"
        ) from None
    except RecursionError:
        raise fail(_TOO_DEEP) from None
    faults += [f"{path}: {note}" for note in notes]
    if _too_deep(value):
        raise fail(_TOO_DEEP)
    if not isinstance(value, dict):
        raise fail(
            f"expected one JSON object {{...}}, found {show(value)}; "
            "see configs/smoke.json for a whole run file"
        )
    return value


def _too_deep(value: Any) -> bool:
    """Whether lists and sections nest so deep that the recursions to come could not end well."""
    level = [value]
    for _ in range(_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def _parse(text: str) -> tuple[Any, list[str]]:
    """The value of a JSON text, and what strict JSON or a sound run file would not have."""
    notes: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                notes.append(
                    f"{show(key)} is written twice in one section, as {show(result[key])} and as "
                    f"{show(value)}; keep one"
                )
            result[key] = value
        return result

    def constant(word: str) -> float:
        notes.append(f"{word} is not a number JSON knows; write a finite number or null")
        return _STAND_IN

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            notes.append(f"{show(digits)} is out of a number's range; write one below 1e308")
        return value if math.isfinite(value) else _STAND_IN

    def integer(digits: str) -> int:
        value = int(digits) if len(digits) < 25 else _INTEGER_LIMIT
        if not -_INTEGER_LIMIT <= value < _INTEGER_LIMIT:
            notes.append(f"{show(digits)} is out of range; whole numbers end at 2^63 - 1")
            return 0
        return value

    value = json.loads(
        text, object_pairs_hook=pairs, parse_constant=constant, parse_float=real, parse_int=integer
    )
    return value, notes


# --- merging ---------------------------------------------------------------------------------


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a run file laid over others, as one that extends another is; both are kept."""
    result = copy.deepcopy(dict(base))
    _merge(result, over, "", {})
    return result


def _merge(
    base: dict[str, Any], over: Mapping[str, Any], source: str, origins: Origins, at: Key = ()
) -> None:
    """Lay `over` on `base` in place: sections key by key, anything else replaced whole."""
    for key, value in over.items():
        path = (*at, key)
        if isinstance(value, dict):
            if not isinstance(base.get(key), dict):
                base[key] = {}
            origins.setdefault(path, source)
            _merge(base[key], value, source, origins, path)
        else:
            base[key] = value
            origins[path] = source


def _apply_sets(
    raw: dict[str, Any], sets: Sequence[str], faults: list[str], origins: Origins
) -> None:
    for item in sets:
        key, equals, text = item.partition("=")
        parts = tuple(key.strip().split("."))
        if not equals or not all(parts):
            faults.append(
                f"--set {show(item)[1:-1]}: expected key=value; write for example "
                "--set training.steps=100"
            )
            continue
        if parts[0] in ("extends", "$schema"):
            faults.append(f"--set {key}: belongs into a run file; write it there")
            continue
        value = _set_value(text, item, faults)
        section: Any = raw
        for depth, part in enumerate(parts[:-1]):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                prefix = ".".join(parts[: depth + 1])
                faults.append(
                    f"--set {key}: {prefix} is {show(section)}, not a section; set {prefix} itself"
                )
                break
        else:
            source = "--set "
            if isinstance(value, dict) and isinstance(section.get(parts[-1]), dict):
                _merge(section[parts[-1]], value, source, origins, parts)
            else:
                section[parts[-1]] = value
                origins[parts] = source


def _set_value(text: str, item: str, faults: list[str]) -> Any:
    if text.strip() in ("NaN", "Infinity", "-Infinity"):
        return text
    try:
        value, notes = _parse(text)
    except (json.JSONDecodeError, RecursionError):
        return text
    if _too_deep(value):
        return text
    faults += [f"--set {item}: {note}" for note in notes]
    return value
