"""The interface of every tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int32]
Spans: TypeAlias = "Sequence[tuple[int, int]]"
Placed: TypeAlias = "tuple[list[int], list[tuple[int, int]]]"


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids lie in [0, vocab_size).
        bos_id, eos_id, pad_id: None if the vocabulary has no such token.
        end_ids: every id that ends a text: EOS, and those of `generation_config.json`.
        prefix_ids, suffix_ids: what stands before and after a text, by the tokenizer's settings.
        generation_config: the content of a `generation_config.json`; empty if there is none.
        sha256: the hash of the file that `save` writes and names.
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
        """Return the ids of each text; the number of threads changes nothing."""

    def encode_with_offsets(self, text: str, plain: Spans = ()) -> Placed:
        """Return the ids of a text in which names of control tokens are those tokens.

        Args:
            plain: character spans [start, stop) whose control token names stay text, such as the
                words of a user in a rendered chat.
        Returns:
            Ids, and the characters [start, stop) of each; ids that share a character all name it.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids. Control tokens and ids outside the vocabulary have none."""

    def count_bytes(self, ids: Sequence[int]) -> int:
        """Return the bytes of UTF-8 text of ids; of a character cut at an edge, those within."""

    def pieces(self) -> list[str]:
        """Return the name of each id in the vocabulary; holes are empty."""

    def begin_with_bos(self, begins: bool) -> None:
        """Record whether the documents that a model learns from begin with BOS.

        `save` and `export` keep it, so that the texts that the model continues begin likewise.
        """

    def save(self, folder: Path) -> str:
        """Write the tokenizer's files into an existing folder; return the main file's name."""

    def export(self, folder: Path) -> None:
        """Write the tokenizer as Hugging Face's `tokenizer.json` and `tokenizer_config.json`."""


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text that a model continues, with what the tokenizer begins texts with.

    The tokenizer's suffix is omitted: it ends a text, and this one goes on.
    """
    return [*tokenizer.prefix_ids, *tokenizer.encode(text)]


def overlaps(start: int, stop: int, spans: Spans) -> bool:
    """Return whether [start, stop) shares a character with one of the spans."""
    return any(start < end and begin < stop for begin, end in spans)
