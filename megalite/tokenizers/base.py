"""The interface of every tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int32]
Spans: TypeAlias = "Sequence[tuple[int, int]]"
IdsWithOffsets: TypeAlias = "tuple[list[int], list[tuple[int, int]]]"


class Tokenizer(Protocol):
    """A tokenizer of any kind.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        bos_id, eos_id, pad_id: None if the vocabulary has no such token.
        end_ids: all ids that end a text: EOS, and those of `generation_config.json`.
        prefix_ids, suffix_ids: ids that the tokenizer's settings put before and after a text.
        generation_config: the content of `generation_config.json`, empty if there is none.
        sha256: the hash of the file whose name `save` returns.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int | None: ...

    @property
    def end_ids(self) -> tuple[int, ...]: ...

    @property
    def prefix_ids(self) -> tuple[int, ...]: ...

    @property
    def suffix_ids(self) -> tuple[int, ...]: ...

    @property
    def generation_config(self) -> dict[str, Any]: ...

    @property
    def sha256(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS. Names of control tokens stay text."""

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        """Return the ids of each text, which do not depend on the number of threads."""

    def encode_with_offsets(self, text: str, plain: Spans = ()) -> IdsWithOffsets:
        """Return the ids of a text, in which names of control tokens become those tokens.

        Args:
            plain: character spans [start, stop) in which such names stay text, such as a user's
                words in a rendered chat.
        Returns:
            the ids, and the character span [start, stop) of each. Spans of ids that share a
            character overlap.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids. Control tokens and ids outside the vocabulary have no text."""

    def count_bytes(self, ids: Sequence[int]) -> int:
        """Return the number of UTF-8 bytes that ids stand for, which may include partial
        characters.
        """

    def pieces(self) -> list[str]:
        """Return the name of each id in the vocabulary, "" for unused ids."""

    def begin_with_bos(self, begins: bool) -> None:
        """Record whether training documents begin with BOS, so that prompts do the same.

        `save` and `export` write the record.
        """

    def save(self, folder: Path) -> str:
        """Write the tokenizer's files to an existing folder; return the main file's name."""

    def export(self, folder: Path) -> None:
        """Write the tokenizer as Hugging Face's `tokenizer.json` and `tokenizer_config.json`."""


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt: the tokenizer's prefix and the text, without the suffix."""
    return [*tokenizer.prefix_ids, *tokenizer.encode(text)]


def overlaps(start: int, stop: int, spans: Spans) -> bool:
    """Return whether [start, stop) shares a character with one of the spans."""
    return any(start < end and begin < stop for begin, end in spans)
