"""Hugging Face's `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megalite.errors import DataError
from megalite.tokenizers.base import Ids, IdsWithOffsets, Spans, overlaps
from megalite.tokenizers.export import export_tokenizer, prefix_and_suffix_of
from megalite.tokenizers.special_tokens import (
    TOKENIZER_CONFIG,
    AddedToken,
    TokenizerBase,
    TokenizerSettings,
    end_ids,
)

HUGGING_FACE = "tokenizer.json"
_MAX_UNUSED_IDS = 1 << 22
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
# Stands for the control token before a piece of text that is encoded separately.
_SENTINEL = "\uf8ff\ue000\uf8ff"


class HuggingFaceTokenizer(TokenizerBase):
    """Tokenizer of a `tokenizer.json` and the settings in its folder.

    `encode_batch` uses RAYON_NUM_THREADS threads; the library has no other setting.

    Args:
        data: the content of the `tokenizer.json`.
        source: name and content of the file that `save` writes. None means the `tokenizer.json`.
    """

    def __init__(
        self, data: bytes, settings: TokenizerSettings, source: tuple[str, bytes] | None = None
    ) -> None:
        self._data = data
        self._settings = settings
        self._source = source or (HUGGING_FACE, data)
        self._tokenizer = self._load()
        self._with_controls = self._load()
        self._tokenizer.encode_special_tokens = True  # encodes their names as text
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids, default=-1) + 1  # some ids may be unused
        if self.vocab_size > _MAX_UNUSED_IDS + 2 * len(ids):
            raise DataError(
                f"{HUGGING_FACE} gives the id {self.vocab_size - 1} to one of its {len(ids)} "
                "tokens; ids are the rows of the model's embedding: number them from 0 on"
            )
        find = self._tokenizer.token_to_id
        self.bos_id = settings.find("bos_token", find)
        self.eos_id = settings.find("eos_token", find)
        self.pad_id = settings.find("pad_token", find)
        self.end_ids = end_ids(self.eos_id, settings.ids("eos_token_id"))
        self.prefix_ids, self.suffix_ids = self._around()
        self.sha256 = hashlib.sha256(self._source[1]).hexdigest()

    def _load(self) -> Any:
        import tokenizers

        backend = tokenizers.Tokenizer.from_buffer(self._data)
        backend.no_truncation()
        backend.no_padding()
        present = {token.content for token in backend.get_added_tokens_decoder().values()}
        for token in self._settings.added_tokens:
            if token.content not in present:
                flags = {name: getattr(token, name) for name in _FLAGS}
                if self._source[0] != HUGGING_FACE:  # SentencePiece's normalizer adds a space
                    flags["normalized"] = False
                backend.add_tokens([tokenizers.AddedToken(token.content, **flags)])
                self._check_added(backend.token_to_id(token.content), token)
        for name in self._settings.missing(backend.token_to_id):
            backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False)])
        special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        for name in self._settings.special_names:
            if name not in special and backend.token_to_id(name) is not None:
                backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False)])
        return backend

    def _check_added(self, id: int | None, token: AddedToken) -> None:
        """Raise DataError if a token got another id than its file defines."""
        if id != token.id:
            raise DataError(
                f"the added token {token.content!r} has the id {token.id}, but after those of "
                f"{self._source[0]} it would get {id}; save the tokenizer again with the program "
                "that added it"
            )

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids before and after a text by the tokenizer's settings."""
        if self._source[0] == HUGGING_FACE:  # its post-processor overrides the settings
            before, after = prefix_and_suffix_of(self._with_controls)
        else:
            before, after = self._settings.around(self.bos_id, self.eos_id)
        return self._settings.begin(before, self.bos_id), tuple(after)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        del threads
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_offsets(self, text: str, plain: Spans = ()) -> IdsWithOffsets:
        encoding = self._with_controls.encode(text, add_special_tokens=False)
        ids = list(encoding.ids)
        offsets = list(encoding.offsets)
        names = [n for n, id in enumerate(ids) if self._is_control(id, text, offsets[n])]
        controls = [n for n in names if not overlaps(offsets[n][0], offsets[n][1], plain)]
        if len(controls) == len(names):
            return ids, offsets
        joined = list[int]()
        joined_offsets = list[tuple[int, int]]()
        first = start = 0
        for control in (*controls, len(ids)):  # the text before each token, then the token
            stop = offsets[control][0] if control < len(ids) else len(text)
            if any(first <= name < control for name in names):
                part, part_offsets = self._encode_part(text[start:stop], at_start=start == 0)
                part_offsets = [(start + a, start + b) for a, b in part_offsets]
            else:
                part = ids[first:control]
                part_offsets = offsets[first:control]
            joined += part + ids[control : control + 1]
            joined_offsets += part_offsets + offsets[control : control + 1]
            first = control + 1
            start = stop if control == len(ids) else offsets[control][1]
        return joined, joined_offsets

    def _is_control(self, id: int, text: str, span: tuple[int, int]) -> bool:
        """Return whether an id is a control token whose name is in the text, not an unknown one."""
        token = self._special.get(id)
        if token is None:
            return False
        return bool(token.normalized) or text[slice(*span)].strip() == token.content.strip()

    def _encode_part(self, text: str, *, at_start: bool) -> IdsWithOffsets:
        """Encode a part of a text as plain text, at the text's start or after a control token.

        Tokenizers may encode a word at the start differently from one after a token.
        """
        before = "" if at_start else _SENTINEL
        encoding = self._with_sentinel.encode(before + text, add_special_tokens=False)
        skipped = 0 if at_start else 1
        return (
            list(encoding.ids[skipped:]),
            [(a - len(before), b - len(before)) for a, b in encoding.offsets[skipped:]],
        )

    @cached_property
    def _with_sentinel(self) -> Any:
        """A tokenizer for plain text that has the sentinel as a token."""
        import tokenizers

        backend = self._load()
        backend.encode_special_tokens = True
        backend.add_tokens([tokenizers.AddedToken(_SENTINEL, normalized=False, special=False)])
        return backend

    @cached_property
    def _special(self) -> dict[int, Any]:
        tokens = self._tokenizer.get_added_tokens_decoder()
        return {id: token for id, token in tokens.items() if token.special}

    def decode(self, ids: Sequence[int]) -> str:
        valid = [int(id) for id in ids if 0 <= id < self.vocab_size]
        return str(self._tokenizer.decode(valid, skip_special_tokens=True))

    def count_bytes(self, ids: Sequence[int]) -> int:
        if self._byte_level:  # each character of a token's name stands for a byte
            special = self._tokenizer.get_added_tokens_decoder()
            names = (self._tokenizer.id_to_token(int(id)) or "" for id in ids if id not in special)
            added = (
                token.content for id in ids if (token := special.get(id)) and not token.special
            )
            return sum(map(len, names)) + sum(len(text.encode()) for text in added)
        text = self.decode(ids)
        # Byte fallback decodes each byte of a partial character to a U+FFFD of three bytes.
        partial = len(text) - len(text.strip("\ufffd"))
        return len(text.encode()) - 2 * partial

    @cached_property
    def _byte_level(self) -> bool:
        decoder = json.loads(self._data).get("decoder") or {}
        kinds = [decoder, *decoder.get("decoders", ())]
        return any(kind.get("type") == "ByteLevel" for kind in kinds)

    def pieces(self) -> list[str]:
        return [self._tokenizer.id_to_token(id) or "" for id in range(self.vocab_size)]

    def save(self, folder: Path) -> str:
        self._settings.save(folder)
        name, data = self._source
        (folder / name).write_bytes(data)
        return name

    def export(self, folder: Path) -> None:
        around = prefix_and_suffix_of(self._with_controls)
        if around != (list(self.prefix_ids), list(self.suffix_ids)):
            export_tokenizer(self._load(), self, folder, self._settings)
        elif self._source[0] == HUGGING_FACE and TOKENIZER_CONFIG in self._settings.files:
            self.save(folder)  # unchanged, including truncation and the like
            # Without a class, transformers would choose one by the model's type.
            if "tokenizer_class" not in self._settings.config:
                config = {**self._settings.config, "tokenizer_class": "PreTrainedTokenizerFast"}
                (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        else:
            export_tokenizer(self._load(), self, folder, self._settings)
