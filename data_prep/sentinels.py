"""Sentinels in the texts of a conversation, which show the texts' positions in its rendering.

A sentinel is a number that occurs nowhere else in the conversation. The filters of templates (trim,
upper, tojson) do not change digits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

# The first digit occurs once, so that sentinels overlap neither each other nor the text around.
_DIGITS = "70318294651"


def new_sentinel(text: str) -> str:
    """Return a sentinel that does not occur in `text`."""
    sentinel = _DIGITS
    while sentinel in text:
        sentinel += "0"
    return sentinel


def remove_sentinels(text: str, sentinel: str) -> tuple[str, list[int]]:
    """Return a text without its sentinels, and their positions in it."""
    parts = text.split(sentinel)
    places = []
    length = 0
    for part in parts[:-1]:
        length += len(part)
        places.append(length)
    return "".join(parts), places


def find_names(texts: Iterable[str], names: re.Pattern[str] | None) -> list[str]:
    """Return the names that occur in any of the texts, each once."""
    if names is None:
        return []
    return list(dict.fromkeys(name for text in texts for name in names.findall(text)))


def insert(value: Any, sentinel: str, names: Iterable[str]) -> Any:
    """Return a JSON value with a sentinel after the first character of each name in its texts."""
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
    return _changed(value, lambda text: pattern.sub(lambda m: m[0][:1] + sentinel + m[0][1:], text))


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(item, change) for item in value]
    return value
