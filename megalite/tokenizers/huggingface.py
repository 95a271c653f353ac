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
from megalite.tokenizers.base import Ids, Placed, Spans, overlaps
from megalite.tokenizers.export import around_text, export_tokenizer
from megalite.tokenizers.special_tokens import (
    TOKENIZER_CONFIG,
    AddedToken,
    Companions,
    TokenizerBase,
    end_ids,
)

HUGGING_FACE = "tokenizer.json"
_MOST_IDS = 1 << 22  # holes are allowed, but not so many
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
# Stands for the control token before a piece of text that is encoded separately.
_MARK = "\uf8ff\ue000\uf8ff"


class HuggingFaceTokenizer(TokenizerBase):
    """A `tokenizer.json`, with the additions of the files in its folder.

    `encode_batch` uses as many threads as RAYON_NUM_THREADS says: the library has no other way.

    Args:
        data: the content of the `tokenizer.json`.
        source: name and content of the file that `save` writes, if that is another one.
    """

    def __init__(
        self, data: bytes, companions: Companions, source: tuple[str, bytes] | None = None
    ) -> None:
        self._data = data
        self._companions = companions
        self._source = source or (HUGGING_FACE, data)
        self._tokenizer = self._load()
        self._with_controls = self._load()
        self._tokenizer.encode_special_tokens = True  # as text, that is: not as control tokens
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids, default=-1) + 1  # ids may have holes
        if self.vocab_size > _MOST_IDS + 2 * len(ids):
            raise DataError(
                f"{HUGGING_FACE} gives the id {self.vocab_size - 1} to one of its {len(ids)} "
                "tokens; ids are the rows of the model's embedding: number them from 0 on"
            )
        find = self._tokenizer.token_to_id
        self.bos_id = companions.find("bos_token", find)
        self.eos_id = companions.find("eos_token", find)
        self.pad_id = companions.find("pad_token", find)
        self.end_ids = end_ids(self.eos_id, companions.ids("eos_token_id"))
        self.prefix_ids, self.suffix_ids = self._around()
        self.sha256 = hashlib.sha256(self._source[1]).hexdigest()

    def _load(self) -> Any:
        import tokenizers

        made = tokenizers.Tokenizer.from_buffer(self._data)
        made.no_truncation()
        made.no_padding()
        known = {token.content for token in made.get_added_tokens_decoder().values()}
        for token in self._companions.added_tokens:
            if token.content not in known:
                flags = {name: getattr(token, name) for name in _FLAGS}
                if self._source[0] != HUGGING_FACE:  # SentencePiece's normalizer adds a space
                    flags["normalized"] = False
                made.add_tokens([tokenizers.AddedToken(token.content, **flags)])
                self._check_added(made.token_to_id(token.content), token)
        for name in self._companions.missing(made.token_to_id):
            made.add_special_tokens([tokenizers.AddedToken(name, normalized=False)])
        special = {t.content for t in made.get_added_tokens_decoder().values() if t.special}
        for name in self._companions.special_names:
            if name not in special and made.token_to_id(name) is not None:
                made.add_special_tokens([tokenizers.AddedToken(name, normalized=False)])
        return made

    def _check_added(self, id: int | None, token: AddedToken) -> None:
        """Refuse a token that gets another id than its files say."""
        if id != token.id:
            raise DataError(
                f"the added token {token.content!r} has the id {token.id}, but after those of "
                f"{self._source[0]} it would get {id}; save the tokenizer again with the program "
                "that added it"
            )

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids before and after a text by the tokenizer's own settings."""
        if self._source[0] == HUGGING_FACE:  # then its post-processor alone decides
            before, after = around_text(self._with_controls)
        else:
            before, after = self._companions.around(self.bos_id, self.eos_id)
        return self._companions.begin(before, self.bos_id), tuple(after)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        del threads
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]

    def encode_with_offsets(self, text: str, plain: Spans = ()) -> Placed:
        found = self._with_controls.encode(text, add_special_tokens=False)
        ids = list(found.ids)
        places = list(found.offsets)
        controls = [n for n, id in enumerate(ids) if self._is_control(id, text, places[n])]
        kept = [n for n in controls if not overlaps(places[n][0], places[n][1], plain)]
        if len(kept) == len(controls):
            return ids, places
        made = list[int]()
        made_places = list[tuple[int, int]]()
        first = start = 0
        for control in (*kept, len(ids)):  # the text before each, then the token itself
            stop = places[control][0] if control < len(ids) else len(text)
            if any(first <= other < control for other in controls):
                part, part_places = self._encode_part(text[start:stop], leads=start == 0)
                part_places = [(start + a, start + b) for a, b in part_places]
            else:
                part = ids[first:control]
                part_places = places[first:control]
            made += part + ids[control : control + 1]
            made_places += part_places + places[control : control + 1]
            first = control + 1
            start = stop if control == len(ids) else places[control][1]
        return made, made_places

    def _is_control(self, id: int, text: str, place: tuple[int, int]) -> bool:
        """Return whether an id stands for its own name, and not for something unknown."""
        token = self._special.get(id)
        if token is None:
            return False
        return bool(token.normalized) or text[slice(*place)].strip() == token.content.strip()

    def _encode_part(self, text: str, *, leads: bool) -> Placed:
        """Encode what follows a control token as plain text; `leads`: the text begins there."""
        # tokenizers may treat the beginning of a text in another way than what follows a token
        before = "" if leads else _MARK
        found = self._marked.encode(before + text, add_special_tokens=False)
        skipped = 0 if leads else 1
        return (
            list(found.ids[skipped:]),
            [(a - len(before), b - len(before)) for a, b in found.offsets[skipped:]],
        )

    @cached_property
    def _marked(self) -> Any:
        """Tokenizer for plain text, which also takes the mark for a token."""
        import tokenizers

        made = self._load()
        made.encode_special_tokens = True
        made.add_tokens([tokenizers.AddedToken(_MARK, normalized=False, special=False)])
        return made

    @cached_property
    def _special(self) -> dict[int, Any]:
        found = self._tokenizer.get_added_tokens_decoder()
        return {id: token for id, token in found.items() if token.special}

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(id) for id in ids if 0 <= id < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def count_bytes(self, ids: Sequence[int]) -> int:
        if self._byte_level:  # a character of a token's name stands for a byte
            special = self._tokenizer.get_added_tokens_decoder()
            names = (self._tokenizer.id_to_token(int(id)) or "" for id in ids if id not in special)
            added = (
                token.content for id in ids if (token := special.get(id)) and not token.special
            )
            return sum(map(len, names)) + sum(len(text.encode()) for text in added)
        text = self.decode(ids)
        cut = len(text) - len(text.strip("\ufffd"))  # byte fallback gives one for each single byte
        return len(text.encode()) - 2 * cut

    @cached_property
    def _byte_level(self) -> bool:
        decoder = json.loads(self._data).get("decoder") or {}
        kinds = [decoder, *decoder.get("decoders", ())]
        return any(kind.get("type") == "ByteLevel" for kind in kinds)

    def pieces(self) -> list[str]:
        return [self._tokenizer.id_to_token(id) or "" for id in range(self.vocab_size)]

    def save(self, folder: Path) -> str:
        self._companions.save(folder)
        name, data = self._source
        (folder / name).write_bytes(data)
        return name

    def export(self, folder: Path) -> None:
        around = around_text(self._with_controls)
        if around != (list(self.prefix_ids), list(self.suffix_ids)):
            export_tokenizer(self._load(), self, folder, self._companions)
        elif self._source[0] == HUGGING_FACE and TOKENIZER_CONFIG in self._companions.files:
            self.save(folder)  # as it came, with truncation and the like
            if (
                "tokenizer_class" not in self._companions.config
            ):  # else the model's type would decide
                config = {**self._companions.config, "tokenizer_class": "PreTrainedTokenizerFast"}
                (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        else:
            export_tokenizer(self._load(), self, folder, self._companions)
