"""Write docs/configuration.md from the schema of run files: every key, in tables by section."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megalite.config.deepspeed_tables import REFUSED

_LARGE = 10**9  # larger bounds only reject nonsense, and are not shown
_BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "over",
    "maximum": "to",
    "exclusiveMaximum": "under",
}
_WORDS = {
    "array": "list",
    "boolean": "`true`, `false`",
    "integer": "whole number",
    "null": "`null`",
    "number": "number",
    "object": "section",
    "string": "text",
}
_HEAD = ("", "| key | value | default | meaning |", "| --- | --- | --- | --- |")
_INTRODUCTION = """\
# The run file, key by key

`python -m megalite.config` generates this page from `megalite/config`, together with
`configs/schema.json`, from which an editor completes keys.

A run file is JSON or YAML. The key `training.steps` is `"training": {"steps": 100}` in a JSON file,
`training: {steps: 100}` in a YAML file, and `--set training.steps=100` on a command line. A value
on the command line is parsed as JSON; if it is not JSON, it is text. YAML files follow YAML 1.2:
`3e-4` is a number, `off` and `no` are text, `010` is 10. Tags, anchors, directives and a second
document are refused.

A key that a file does not set comes from the file that it `extends`, or has the default below.
Sections are merged key by key; a list replaces a list. `config.json` in the run folder contains the
complete result. An unknown key or value is an error, which suggests the nearest valid one.

Batch sizes are in samples, times in seconds. Paths are relative to the working directory. The
meaning of `null` is stated for each key that allows it."""
_DEEPSPEED = """
DeepSpeed's own JSON, passed through. Its
[documentation](https://www.deepspeed.ai/docs/config-json/) states meanings and defaults, and
`deepspeed.json` in the run folder contains every value in use. Each value may be `"auto"`. Values
that other sections decide (batch sizes, precision, clipping, the optimizer) are filled in, and must
not be contradicted. Without this section the ZeRO stage is 1.

| key | value |
| --- | --- |"""
_REFUSED = """
Keys of DeepSpeed, or of an earlier DeepSpeed, that are refused here. A key without effect is
accepted if its value is `"auto"` or DeepSpeed's default.

| key | reason and remedy |
| --- | --- |"""


def configuration_page(schema: dict[str, Any]) -> str:
    """Return the Markdown page of the JSON schema of a run file."""
    defs, top = schema["$defs"], schema["properties"]
    lines = [_INTRODUCTION, *_HEAD]
    lines += [_row(key, top[key]) for key in ("$schema", "extends", "name", "plugins")]
    for key, field in top.items():
        for path, name in _sections(key, field, defs):
            about = " ".join(defs[name]["description"].split("\n\n")[0].split())
            lines += ["", f"{'###' if '.' in path else '##'} {path}", "", about, *_HEAD]
            lines += [_row(f"{path}.{k}", inner) for k, inner in defs[name]["properties"].items()]
    lines += ["", "## deepspeed", _DEEPSPEED, *_deepspeed(top["deepspeed"], "deepspeed.")]
    lines += [_REFUSED, *(f"| `deepspeed.{key}` | {why} |" for key, why in REFUSED.items())]
    return "\n".join(lines) + "\n"


def _sections(path: str, field: Any, defs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a section and its subsections: the dotted path of each, and its name in the schema."""
    for kind in field.get("anyOf", [field]):
        at = f"{path}[0]" if "items" in kind else path
        if name := kind.get("items", kind).get("$ref", "").rpartition("/")[2]:
            yield at, name
            for key, inner in defs[name]["properties"].items():
                yield from _sections(f"{at}.{key}", inner, defs)


def _row(key: str, field: dict[str, Any]) -> str:
    if "default" in field:
        default = f"`{json.dumps(field['default'])}`"
    elif isinstance(field.get("type"), list):  # it also allows null
        default = "computed"
    else:
        default = "" if key in ("$schema", "extends") else "required"
    meaning = field["description"].replace("|", "\\|")
    return f"| `{key}` | {_value(field)} | {default} | {meaning} |"


def _value(field: dict[str, Any]) -> str:
    """Describe the values that a key may have."""
    types = field.get("type")
    kinds = [{**field, "type": kind} for kind in types] if isinstance(types, list) else [field]
    return " or ".join(_kind(kind) for kind in field.get("anyOf", kinds))


def _kind(kind: dict[str, Any]) -> str:
    """Describe one kind of value."""
    if "enum" in kind or "const" in kind:
        choices = kind.get("enum", [kind.get("const")])
        return ", ".join(f"`{json.dumps(choice)}`" for choice in choices)
    if "$ref" in kind:
        return "a section"
    if "prefixItems" in kind:
        return f"list of {len(kind['prefixItems'])}: {_kind(kind['prefixItems'][0])}"
    if "items" in kind:
        return f"list: {_kind(kind['items'])}"
    words = ["even"] if "multipleOf" in kind else []
    words.append(_WORDS[kind["type"]])
    for name, word in _BOUNDS.items() if kind["type"] in ("integer", "number") else ():
        if kind.get(name, _LARGE) < _LARGE:
            words += [word, f"{kind[name]:,}"]
    return " ".join(words)


def _deepspeed(section: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, field in section["properties"].items():
        if "properties" in field:
            yield from _deepspeed(field, f"{prefix}{key}.")
        else:
            kinds = [kind for kind in field.get("anyOf", [field]) if kind != {"const": "auto"}]
            values = " or ".join(_kind(kind) if kind else "anything" for kind in kinds)
            yield f"| `{prefix}{key}` | {values} |"
