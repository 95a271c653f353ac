"""Steps that tasks on plain texts share."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.records import Unusable


def require_tokens(texts: Sequence[list[int]]) -> None:
    """Raise Unusable if the tokenizer gives no token for one of the texts."""
    if not all(texts):
        raise Unusable("the tokenizer makes no token of its text")


def surround(
    text: list[int], before: list[int], after: list[int], most: int
) -> tuple[list[int], bool]:
    """Return a text between its edges, at most `most` ids, and whether the text was cut to fit."""
    room = most - len(before) - len(after)
    return before + text[:room] + after, len(text) > room
