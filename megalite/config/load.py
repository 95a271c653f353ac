"""Load a run file: read, extend, apply `--set`, check, and report all faults at once.

A run file is strict JSON, or YAML with the same values. The file that `"extends": "base.json"`
names, relative to the extending file, is read first. The extending file is merged over it key by
key; a list replaces a list. `--set a.b=c` comes last. A key also replaces its alternative
(`test_fraction` replaces `test_split`). If a file does not exist, the shipped files are searched
for its name. No input runs code: the result is always a `RunConfig` or a `ConfigError`.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from megalite.config.deepspeed_keys import deepspeed_faults
from megalite.config.faults import ConfigFault, Key, schema_faults, show
from megalite.config.names import plugins_of, run_folder
from megalite.config.renamed import conflicts, current_name, rename_keys
from megalite.config.rules import rule_faults
from megalite.config.schema import RunConfig
from megalite.config.secrets import explain_redacted, redacted_keys, secret_faults
from megalite.config.strict import (
    drop_halves,
    is_yaml,
    parse_mapping,
    parse_strict,
    read_value,
    too_deep,
)
from megalite.errors import ConfigError
from megalite.log import logger

# next to the package in a checkout, inside it after installation (pyproject.toml)
_PACKAGE = Path(__file__).parents[1]
SHIPPED = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"

Origins = dict[Key, str]  # prefix of a key's faults: the file, or --set
# The path of a run file, or its content. In a content, paths are relative to the working directory.
ConfigSource: TypeAlias = "str | Path | Mapping[str, Any] | RunConfig"
_CONTENT = Path("the configuration")  # name of a content in messages
# Pairs of keys that exclude each other. A file's key removes the other one from extended files.
_ALTERNATIVES: tuple[tuple[Key, Key], ...] = (
    (("training", "steps"), ("training", "tokens")),
    *(
        (("finetune", "data", f"{split}_split"), ("finetune", "data", f"{split}_fraction"))
        for split in ("valid", "test")
    ),
)


def load_config(
    source: ConfigSource, sets: Sequence[str] = (), *, model: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return a checked run file, after `sets` (each `a.b=c`) are applied.

    Args:
        source: the path or the content of the run file.
        sets: changes of single keys.
        model: defaults of the model section.

    Raises:
        ConfigError: every fault of the file, of the files it extends, of `sets` and of rules
            between fields, one line each.
    """
    faults: list[str] = []
    raw: dict[str, Any] = {}
    origins: Origins = {}
    if model is not None:
        _merge(raw, {"model": model}, "the model to start from: ", origins)
    chain = _read_chain(source, faults)
    path = chain[0][0]
    if isinstance(source, str | Path) and path != Path(os.path.expanduser(source)):
        logger.info("%s does not exist; using the shipped %s", source, path)
    for file, content in reversed(chain):
        faults += [f"{file}: {fault}" for fault in conflicts(content)]
    _warn_of_old_names(chain)
    for file, content in reversed(chain):
        _drop_alternatives(raw, content)
        _merge(raw, content, f"{file}: ", origins)
    _drop_alternatives(raw, section_changes(sets))
    _apply_sets(raw, sets, faults, origins)
    return _check(raw, source_name(source), faults, origins)


def source_name(source: ConfigSource) -> str:
    """Return the name of a run file in messages."""
    return str(source if isinstance(source, str | Path) else _CONTENT)


def _warn_of_old_names(chain: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Rename old keys in the files of a chain, in place, with one warning for all."""
    renamed = [
        f"{file}: {old} is now {new}"
        for file, content in reversed(chain)
        for old, new in rename_keys(content).items()
    ]
    if renamed:
        logger.warning("%s; rename it in the file", ", ".join(renamed))


def load_stored(path: Path) -> RunConfig:
    """Return the run file that a run or a checkpoint stores as `config.json`.

    Raises:
        ConfigError: every fault of the file. If an earlier version redacted values, the first line
            explains that.
    """
    faults: list[str] = []
    raw = _read_file(path, None, faults)
    lost = redacted_keys(raw)
    try:
        config = _check(raw, str(path), faults, {}, stored=True)
    except ConfigError as error:
        cause = [f"{path}: {explain_redacted(lost)}"] if lost else []
        raise ConfigError([*cause, *error.faults]) from None
    if lost:
        logger.warning("%s: %s", path, explain_redacted(lost))
    return config


def find_file(name: str | Path, folder: Path = Path()) -> Path:
    """Return the path of a run file: relative to `folder` if it exists there, else shipped."""
    path = folder / os.path.expanduser(name)
    with suppress(OSError, ValueError):  # names that no file can have
        shipped = SHIPPED / str(name).removeprefix("configs/")
        if not path.exists() and ".." not in shipped.parts and shipped.is_file():
            return shipped
    return path


def section_changes(sets: Sequence[str]) -> dict[str, Any]:
    """Return the changes of `--set` as the sections of a run file."""
    raw: dict[str, Any] = {}
    _apply_sets(raw, sets, [], {})
    return raw


def find_run(source: ConfigSource, sets: Sequence[str] = ()) -> Path | None:
    """Return the run folder that a run file names. None means that the file cannot be read."""
    faults: list[str] = []
    folder = run_folder(_stated(source, sets, faults))
    return None if faults else folder


def _stated(source: ConfigSource, sets: Sequence[str], faults: list[str]) -> dict[str, Any]:
    """Return the merged content of a run file and `sets`, unchecked."""
    raw: dict[str, Any] = {}
    for _, content in reversed(_read_chain(source, faults)):
        _merge(raw, content, "", {})
    _apply_sets(raw, sets, faults, {})
    return raw


def run_files(path: str | Path) -> list[Path]:
    """Return the path of a run file, and of each file that it extends, directly or not."""
    return [file for file, _ in _read_chain(path, [])]


def stated_model(source: ConfigSource, sets: Sequence[str] = ()) -> dict[str, Any]:
    """Return the model section of a run file and `sets`, unchecked; {} if there is none."""
    model = _stated(source, sets, []).get("model")
    return model if isinstance(model, dict) else {}


def lacks_model(source: ConfigSource, sets: Sequence[str] = ()) -> bool:
    """Return whether a run file fine-tunes a model that only `--init-from` can name."""
    raw = _stated(source, sets, [])
    return "finetune" in raw and "model" not in raw


def parse_config(raw: Mapping[str, Any], source: str = "the run file") -> RunConfig:
    """Return a checked run file from its parsed content, such as the one in a manifest."""
    return _check(copy.deepcopy(dict(raw)), source, [], {})


def _check(
    raw: dict[str, Any],
    source: str,
    faults: list[str],
    origins: Origins,
    *,
    stored: bool = False,
) -> RunConfig:
    """Check a merged run file. Raise all faults: those given, and those of the check.

    Args:
        stored: whether a run or a checkpoint stores this copy. Then secrets are not reported.
    """
    raw.pop("$schema", None)  # for editors only
    faults += [f"{source}: {fault}" for fault in conflicts(raw)]
    rename_keys(raw)
    notes: list[str] = []
    drop_halves(raw, notes)
    faults += [f"{source}: {note}" for note in notes]
    config, details = schema_faults(raw)
    invalid = [fault.keys[0] for fault in details]
    broken = [*rule_faults(config), *deepspeed_faults(config)]
    for fault in broken if stored else [*broken, *secret_faults(config)]:
        # a rule about an invalid key would only repeat that fault
        if not any(_overlap(key, other) for key in fault.keys for other in invalid):
            details.append(fault)
    faults += [f"{_origin(fault, source, origins)}{fault}" for fault in details]
    if faults:
        raise ConfigError(faults)
    return config.model_copy(update={"plugins": plugins_of(config)})


def _overlap(key: Key, other: Key) -> bool:
    length = min(len(key), len(other))
    return key[:length] == other[:length]


def _origin(fault: ConfigFault, source: str, origins: Origins) -> str:
    """Return the prefix of a fault: the file that contains its first key, or --set."""
    key = fault.keys[0]
    while key and key not in origins and any(part.isdigit() for part in key):
        key = key[:-1]  # an item of a list: the list as a whole has an origin
    if key not in origins:  # a key that is missing from a section that --set created
        above = (origins.get(key[:depth]) for depth in range(len(key) - 1, 0, -1))
        if (parent := next(filter(None, above), "")).startswith("--set"):
            return parent
    # a section that only --set created has no origin, but its keys have
    within = (origin for at, origin in origins.items() if key and at[: len(key)] == key)
    return origins.get(key) or next(within, f"{source}: ")


# --- files -----------------------------------------------------------------------------------


def _read_chain(source: ConfigSource, faults: list[str]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the file, the file it extends, and so on, each with its content.

    An invalid or circular `extends` is added to the faults and ends the list.
    """
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen: list[Path] = []
    path = find_file(source) if isinstance(source, str | Path) else _CONTENT
    while True:
        identity = _resolve(path)
        if identity in seen:
            loop = " -> ".join(str(file) for file, _ in chain) + f" -> {path}"
            faults.append(f"{chain[-1][0]}: extends is circular: {loop}; remove one of them")
            return chain
        seen.append(identity)
        if isinstance(source, str | Path) or chain:
            content = _read_file(path, chain[-1][0] if chain else None, faults)
        else:
            content = _read_content(source, faults)
        parent = content.pop("extends", None) if "extends" in content else ""
        chain.append((path, content))
        if parent == "":
            return chain
        if not isinstance(parent, str) or not parent.isprintable():
            faults.append(
                f"{path}: extends: expected one path as text, got {show(parent)}; "
                'write "extends": "base.json", relative to this file'
            )
            return chain
        path = find_file(parent, path.parent)


def _read_content(source: Mapping[str, Any] | RunConfig, faults: list[str]) -> dict[str, Any]:
    """Return the content of a run file as if it were read from a file."""
    if isinstance(source, RunConfig):
        return source.model_dump(mode="json")
    try:
        value, notes = parse_mapping(source)
    except ConfigError as error:
        raise ConfigError([f"{_CONTENT}: {fault}" for fault in error.faults]) from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{_CONTENT}: expected a path, a mapping or a RunConfig, got {show(value)}; see "
            "configs/smoke.json for a complete run file"
        )
    faults += [f"{_CONTENT}: {note}" for note in notes]
    return value


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return path


def _read_file(path: Path, extended_by: Path | None, faults: list[str]) -> dict[str, Any]:
    """Return the content of one file.

    Raises:
        ConfigError: the faults so far, then the reason why the file has no content.
    """
    by = f" (extended by {extended_by})" if extended_by else ""
    try:
        value, notes = read_value(path)
    except FileNotFoundError:
        raise ConfigError([*faults, f"{path}: no such run file{by}; check the path"]) from None
    except ConfigError as error:
        named = [f"{path}{by}: {fault}" for fault in error.faults]
        raise ConfigError([*faults, *named]) from None
    faults += [f"{path}: {note}" for note in notes]
    if not isinstance(value, dict):
        sections = "sections, such as `training:`" if is_yaml(path) else "one JSON object {...}"
        fault = f"{path}: expected {sections}, got {show(value)}"
        raise ConfigError([*faults, f"{fault}; see configs/smoke.json for a complete run file"])
    return value


# --- merging ---------------------------------------------------------------------------------


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` merged over it, as if a run file extends another.

    Neither argument changes.
    """
    result = copy.deepcopy(dict(base))
    _merge(result, over, "", {})
    return result


def _merge(
    base: dict[str, Any], over: Mapping[str, Any], source: str, origins: Origins, at: Key = ()
) -> None:
    """Merge `over` into `base`, in place: sections key by key, other values as a whole."""
    for key, value in over.items():
        path = (*at, key)
        if isinstance(value, dict):
            if not isinstance(base.get(key), dict):
                base[key] = {}
                origins[path] = source
            origins.setdefault(path, source)
            _merge(base[key], value, source, origins, path)
        else:
            base[key] = value
            origins[path] = source


def _drop_alternatives(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Remove keys of `base` whose alternative is in `over`: a split given as a fraction there."""
    for pair in _ALTERNATIVES:
        for (*sections, key), (*_, other) in (pair, pair[::-1]):
            above, below = _section(over, sections), _section(base, sections)
            if above.get(key) is not None and other not in above:
                below.pop(other, None)


def _section(raw: Any, keys: Sequence[str]) -> Any:
    """Return the section at `keys`; an empty one if there is none."""
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw if isinstance(raw, dict) else {}


def _apply_sets(
    raw: dict[str, Any], sets: Sequence[str], faults: list[str], origins: Origins
) -> None:
    for item in sets:
        key, equals, text = item.partition("=")
        parts = tuple(key.strip().split("."))
        if len(parts) == 2:
            parts = (parts[0], current_name(*parts))
        if not equals or not all(parts):
            faults.append(
                f"--set {show(item)[1:-1]}: expected key=value; write for example "
                "--set training.steps=100"
            )
            continue
        if parts[0] in ("extends", "$schema"):
            faults.append(f"--set {key}: only a run file may contain it; write it there")
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
            _merge(section, {parts[-1]: value}, "--set ", origins, parts[:-1])


def _set_value(text: str, item: str, faults: list[str]) -> Any:
    if text.strip() in ("NaN", "Infinity", "-Infinity"):
        return text
    try:
        value, notes = parse_strict(text)
    except (json.JSONDecodeError, RecursionError):
        return text
    if too_deep(value):
        return text
    faults += [f"--set {item}: {note}" for note in notes]
    return value
