"""docs/configuration.md out of the schema of run files: every key, in tables by section."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megalite.config.deepspeed_tables import REFUSED

_LARGE = 10**9  # a bound from here on keeps nonsense out and is no news
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

Made from `megalite/config` by `python -m megalite.config`, as `configs/schema.json` is, by which an
editor completes a run file.

A run file is JSON or YAML. The key `training.steps` is `"training": {"steps": 100}` in a JSON file,
`training: {steps: 100}` in a YAML file, and `--set training.steps=100` on a command line. A value
on the command line is read as JSON, else as text. YAML files follow YAML 1.2: `3e-4` is a number,
`off` and `no` are text, `010` is 10. Tags, anchors, directives and a second document are refused.

Missing keys come from the file that a file `extends`, then from the defaults here. `config.json` of
the run folder has the complete result. Sections are merged key by key, and a list replaces a list.
An unknown key or value is refused, with the nearest known one.

Batches are counted in samples, times are seconds, paths are relative to the working directory.
`null` leaves a choice to MegaLite, as the meaning says."""
_DEEPSPEED = """
DeepSpeed's own JSON, passed through: meanings and defaults are
[DeepSpeed's](https://www.deepspeed.ai/docs/config-json/), and `deepspeed.json` of the run folder
has every value in use. Each may be `"auto"`. Keys that other sections decide (batch sizes,
precision, clipping, the optimizer) are filled in and may not be contradicted. Without the section
the ZeRO stage is 1.

| key | value |
| --- | --- |"""
_REFUSED = """
Keys of DeepSpeed, or of an earlier DeepSpeed, that are refused here. A key without effect may have
the value `"auto"`, or DeepSpeed's default:

| key | why, and what to do |
| --- | --- |"""


def configuration_page(schema: dict[str, Any]) -> str:
    """Return the page, in Markdown, of the JSON schema of a run file."""
    defs, top = schema["$defs"], schema["properties"]
    lines = [_INTRODUCTION, *_HEAD]
    lines += [_row(key, top[key]) for key in ("$schema", "extends", "name", "plugins")]
    for key, field in top.items():
        for place, name in _sections(key, field, defs):
            told = " ".join(defs[name]["description"].split("\n\n")[0].split())
            lines += ["", f"{'###' if '.' in place else '##'} {place}", "", told, *_HEAD]
            lines += [_row(f"{place}.{k}", one) for k, one in defs[name]["properties"].items()]
    lines += ["", "## deepspeed", _DEEPSPEED, *_deepspeed(top["deepspeed"], "deepspeed.")]
    lines += [_REFUSED, *(f"| `deepspeed.{key}` | {why} |" for key, why in REFUSED.items())]
    return "\n".join(lines) + "\n"


def _sections(place: str, field: Any, defs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a section and those within it: where each stands, and its name in the schema."""
    for kind in field.get("anyOf", [field]):
        at = f"{place}[0]" if "items" in kind else place
        if name := kind.get("items", kind).get("$ref", "").rpartition("/")[2]:
            yield at, name
            for key, inner in defs[name]["properties"].items():
                yield from _sections(f"{at}.{key}", inner, defs)


def _row(key: str, field: dict[str, Any]) -> str:
    if "default" in field:
        default = f"`{json.dumps(field['default'])}`"
    elif isinstance(field.get("type"), list):  # or null, which leaves it to us
        default = "computed"
    else:
        default = "" if key in ("$schema", "extends") else "required"
    meaning = field["description"].replace("|", "\\|")
    return f"| `{key}` | {_value(field)} | {default} | {meaning} |"


def _value(field: dict[str, Any]) -> str:
    """Return what a key may be, in words."""
    types = field.get("type")
    kinds = [{**field, "type": kind} for kind in types] if isinstance(types, list) else [field]
    return " or ".join(_kind(kind) for kind in field.get("anyOf", kinds))


def _kind(kind: dict[str, Any]) -> str:
    """Return one of the things that a key may be."""
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
            told = " or ".join(_kind(kind) if kind else "anything" for kind in kinds)
            yield f"| `{prefix}{key}` | {told} |"
