"""Hugging Face's `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megalite.formats.tokenizer_base import Ids, Placed, Spans, overlaps

HUGGING_FACE = "tokenizer.json"
HUGGING_FACE_CONFIG = "tokenizer_config.json"
# Names in use for the tokens that begin and end a document, where no tokenizer_config.json says;
# BERT's are the last.
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[CLS]")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[SEP]")
# Stands for the control token before a piece of text that is encoded separately.
_MARK = "\uf8ff\ue000\uf8ff"


class HuggingFaceTokenizer:
    """A `tokenizer.json`; BOS and EOS by the `tokenizer_config.json` beside it, or by their names.

    `encode_batch` uses as many threads as RAYON_NUM_THREADS says: the library has no other way.
    """

    def __init__(self, path: Path) -> None:
        config = path.with_name(HUGGING_FACE_CONFIG)
        self._files = {file.name: file.read_bytes() for file in (config,) if file.exists()}
        self._files[HUGGING_FACE] = data = path.read_bytes()
        self._tokenizer, self._with_controls = self._load(), self._load()
        self._tokenizer.encode_special_tokens = True  # as text, that is: not as control tokens
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids, default=-1) + 1  # ids may have holes
        self.bos_id = self._control("bos_token", _BOS_NAMES)
        self.eos_id = self._control("eos_token", _EOS_NAMES)
        self.sha256 = hashlib.sha256(data).hexdigest()

    def _load(self) -> Any:
        import tokenizers

        made = tokenizers.Tokenizer.from_buffer(self._files[HUGGING_FACE])
        made.no_truncation()
        made.no_padding()
        return made

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        del threads
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]

    def encode_with_offsets(self, text: str, plain: Spans = ()) -> Placed:
        found = self._with_controls.encode(text, add_special_tokens=False)
        ids, places = list(found.ids), list(found.offsets)
        controls = [n for n, id in enumerate(ids) if self._is_control(id, text, places[n])]
        kept = [n for n in controls if not overlaps(*places[n], plain)]
        if len(kept) == len(controls):
            return ids, places
        made, made_places = list[int](), list[tuple[int, int]]()
        first = start = 0
        for control in (*kept, len(ids)):  # the text before each, then the token itself
            stop = places[control][0] if control < len(ids) else len(text)
            if any(first <= other < control for other in controls):
                part, part_places = self._encode_part(text[start:stop], leads=start == 0)
                part_places = [(start + a, start + b) for a, b in part_places]
            else:
                part, part_places = ids[first:control], places[first:control]
            made += part + ids[control : control + 1]
            made_places += part_places + places[control : control + 1]
            first, start = control + 1, stop if control == len(ids) else places[control][1]
        return made, made_places

    def _is_control(self, id: int, text: str, place: tuple[int, int]) -> bool:
        """Whether an id stands for its own name, and not for something unknown."""
        token = self._special.get(id)
        if token is None:
            return False
        return token.normalized or text[slice(*place)].strip() == token.content.strip()

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
        """The tokenizer for plain text, which also takes the mark for a token."""
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
        return str(self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True))

    def count_bytes(self, ids: Sequence[int]) -> int:
        if self._byte_level:  # a character of a token's name stands for a byte
            special = self._tokenizer.get_added_tokens_decoder()
            names = (self._tokenizer.id_to_token(int(id)) or "" for id in ids if id not in special)
            added = (
                token.content for id in ids if (token := special.get(id)) and not token.special
            )
            return sum(map(len, names)) + sum(len(text.encode()) for text in added)
        text = self.decode(ids)
        cut = len(text) - len(text.strip("\ufffd"))  # byte fallback gives one for each lone byte
        return len(text.encode()) - 2 * cut

    @cached_property
    def _byte_level(self) -> bool:
        decoder = json.loads(self._files[HUGGING_FACE]).get("decoder") or {}
        kinds = [decoder, *decoder.get("decoders", ())]
        return any(kind.get("type") == "ByteLevel" for kind in kinds)

    def pieces(self) -> list[str]:
        return [self._tokenizer.id_to_token(id) or "" for id in range(self.vocab_size)]

    def save(self, folder: Path) -> str:
        for name, data in self._files.items():
            (folder / name).write_bytes(data)
        return HUGGING_FACE

    def export(self, folder: Path) -> None:
        self.save(folder)
        config = folder / HUGGING_FACE_CONFIG
        if not config.exists():
            names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
            told = {k: self._tokenizer.id_to_token(id) for k, id in names.items() if id is not None}
            content = {"tokenizer_class": "PreTrainedTokenizerFast", **told}
            config.write_text(json.dumps(content, indent=2) + "\n")

    def _control(self, key: str, names: Sequence[str]) -> int | None:
        config = json.loads(self._files.get(HUGGING_FACE_CONFIG, b"{}"))
        if key in config:
            token = config[key]
            name = token["content"] if isinstance(token, dict) else token
            names = (name,) if name else ()
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((int(id) for id in ids if id is not None), None)
