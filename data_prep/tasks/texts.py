"""Functions that tasks on texts share."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.records import Unusable


def require_tokens(texts: Sequence[list[int]]) -> None:
    """Raise Unusable if one of the texts has no tokens."""
    if not all(texts):
        raise Unusable("the tokenizer makes no token of its text")


def surround(
    text: list[int], before: list[int], after: list[int], most: int
) -> tuple[list[int], bool]:
    """Return at most `most` ids with prefix and suffix, and whether the text was truncated."""
    room = most - len(before) - len(after)
    return before + text[:room] + after, len(text) > room
