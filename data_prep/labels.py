"""The labels of a classification: how a row names one, and which of them look the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.records import Unusable

_WIDTHLESS = "\\u00ad\\u200b-\\u200f\\u2060\\ufeff"  # zero-width spaces, joiners and marks
_AROUND = re.compile(rf"^[\s{_WIDTHLESS}]+|[\s{_WIDTHLESS}]+$")
_NO_WIDTH = re.compile(f"[{_WIDTHLESS}]")


def label_name(value: Any, column: str, names: Sequence[str] | None) -> str:
    """Return a label's name: True, False, the digits of a number, or the name that the source gives
    it.

    White space around a name, and characters without a width, are no part of it.
    """
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        if names is None:
            return str(value)
        if 0 <= value < len(names):
            return names[value]
    elif isinstance(value, str) and (name := _AROUND.sub("", value)):
        return name
    known = f", not one of {', '.join(names)}" if names else ", neither a whole number nor a name"
    raise Unusable(f"field {column!r} is {value!r:.40}{known}")


def describe_similar(counts: Mapping[str, int]) -> list[str]:
    """Name labels that differ only in white space, case or Unicode form, or are equal
    numbers.

    Args:
        counts: rows of each label.
    """
    groups: dict[str, list[str]] = {}
    for label in counts:
        groups.setdefault(_skeleton(label), []).append(label)
    return [_describe(labels, counts) for labels in groups.values() if len(labels) > 1]


def _describe(labels: Sequence[str], counts: Mapping[str, int]) -> str:
    composed = {unicodedata.normalize("NFC", label) for label in labels}
    write = repr if len(composed) == len(labels) else ascii  # which shows the difference
    return ", ".join(f"{write(label)} ({counts[label]:,})" for label in labels)


def _skeleton(label: str) -> str:
    """Return a key that labels share if people read them as one."""
    folded = unicodedata.normalize("NFKC", _NO_WIDTH.sub("", label)).casefold()
    folded = " ".join(unicodedata.normalize("NFKC", folded).split())
    try:
        return repr(float(folded)) if folded[:1] in "+-.0123456789" else folded
    except ValueError:
        return folded
