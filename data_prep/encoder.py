"""Encoding of texts as the tokens of shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from data_prep.options import TokenizeOptions
from data_prep.streams import Stream
from megalite.errors import CommandError, DataError
from megalite.formats.index import Dtype, Integers, dtype_for
from megalite.tokenizers.tokenizer import Tokenizer

_VERSION = 1  # of the content of parts


class Encoder:
    """A tokenizer with the options of the command, such as whether documents have BOS and EOS.

    The tokenizer records whether documents begin with BOS.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenizeOptions) -> None:
        self.tokenizer = tokenizer
        before = list(tokenizer.prefix_ids)
        begins = bool(before) if options.bos is None else options.bos
        if begins and not before:
            before = [_control(tokenizer.bos_id, "BOS", "omit --bos")]
        if begins != bool(tokenizer.prefix_ids):
            tokenizer.begin_with_bos(begins)
        self.options = replace(options, bos=begins)
        self._before = before if begins else []
        self.bos = self._before[0] if begins else None
        self.eos = _control(tokenizer.eos_id, "EOS", "pass --no-eos") if options.eos else None
        self.dtype: Dtype = dtype_for(tokenizer.vocab_size)

    def encode(self, texts: Sequence[str]) -> tuple[Integers, npt.NDArray[np.int64]]:
        """Return the ids of all texts as one array in the shards' dtype, and their lengths.

        Raises:
            DataError: an id is outside the vocabulary, and would be changed by the cast.
        """
        rows = self.tokenizer.encode_batch(texts)
        around = len(self._before) + (self.eos is not None)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows)) + around
        ids = np.concatenate(rows) if rows else np.empty(0, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
            raise DataError(
                f"the tokenizer gives ids from {ids.min()} to {ids.max()}, outside its own "
                f"vocabulary of {self.tokenizer.vocab_size}; its file is damaged: use another copy"
            )
        if not around:
            return ids.astype(self.dtype), lengths
        tokens = np.empty(ids.size + around * len(rows), self.dtype)
        ends = np.cumsum(lengths)
        inner = np.ones(tokens.size, np.bool_)
        starts = [(id, ends - lengths + n) for n, id in enumerate(self._before)]
        for id, positions in (*starts, (self.eos, ends - 1)):
            if id is not None:
                tokens[positions] = id
                inner[positions] = False
        tokens[inner] = ids
        return tokens, lengths

    def key(self, stream: Stream) -> str:
        """Return a hash of everything that decides the content of a stream's parts."""
        text_field = self.options.text_field
        hashes = self.options.hashes
        begins = self._before if len(self._before) > 1 else self.bos
        settings = [self.tokenizer.sha256, begins, self.eos, text_field, hashes]
        content = [_VERSION, stream.identity, *settings]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def _control(id: int | None, name: str, otherwise: str) -> int:
    if id is None:
        raise CommandError(f"the tokenizer has no {name} token; use another, or {otherwise}")
    return id
