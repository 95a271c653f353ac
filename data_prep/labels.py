"""Names of the labels of a classification, and labels that look the same."""

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
    """Return the name of a label: text, the digits of a number, True or False.

    White space and zero-width characters around a name are removed.

    Args:
        names: the source's names for numbers. None means that numbers are names.
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
    expected = f", not one of {', '.join(names)}" if names else ", neither an integer nor a name"
    raise Unusable(f"field {column!r} is {value!r:.40}{expected}")


def describe_similar(counts: Mapping[str, int]) -> list[str]:
    """Return groups of labels that differ only in white space, case, Unicode form, or digits.

    Args:
        counts: number of rows of each label.
    """
    groups: dict[str, list[str]] = {}
    for label in counts:
        groups.setdefault(_skeleton(label), []).append(label)
    return [_describe(labels, counts) for labels in groups.values() if len(labels) > 1]


def _describe(labels: Sequence[str], counts: Mapping[str, int]) -> str:
    composed = {unicodedata.normalize("NFC", label) for label in labels}
    write = repr if len(composed) == len(labels) else ascii  # `ascii` shows the difference
    return ", ".join(f"{write(label)} ({counts[label]:,})" for label in labels)


def _skeleton(label: str) -> str:
    """Return a key that is equal for labels that look the same."""
    folded = unicodedata.normalize("NFKC", _NO_WIDTH.sub("", label)).casefold()
    folded = " ".join(unicodedata.normalize("NFKC", folded).split())
    try:
        return repr(float(folded)) if folded[:1] in "+-.0123456789" else folded
    except ValueError:
        return folded
