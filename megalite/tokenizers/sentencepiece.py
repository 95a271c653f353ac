"""SentencePiece models."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megalite.tokenizers.base import Ids, IdsWithOffsets, Spans, overlaps
from megalite.tokenizers.export import build_sentencepiece, export_sentencepiece
from megalite.tokenizers.huggingface import HuggingFaceTokenizer
from megalite.tokenizers.special_tokens import TokenizerBase, TokenizerSettings, end_ids

SENTENCEPIECE = "tokenizer.model"


class SentencePieceTokenizer(TokenizerBase):
    """Tokenizer of a SentencePiece model.

    The library represents a space by U+2581, so that character is decoded as a space.

    Args:
        model: the content of the `.model` file.
    """

    def __init__(self, model: bytes, settings: TokenizerSettings | None = None) -> None:
        import sentencepiece

        self._model = model
        self._settings = settings or TokenizerSettings(None)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id = self._find("bos_token", self._processor.bos_id())
        self.eos_id = self._find("eos_token", self._processor.eos_id())
        self.pad_id = self._find("pad_token", self._processor.pad_id())
        self.end_ids = end_ids(self.eos_id, self._settings.ids("eos_token_id"))
        before, after = self._settings.around(self.bos_id, self.eos_id)
        self.prefix_ids = self._settings.begin(before, self.bos_id)
        self.suffix_ids = tuple(after)
        self.sha256 = hashlib.sha256(model).hexdigest()

    def _find(self, key: str, default: int) -> int | None:
        """Return the id of a special token; `default` is the model's, negative if it has none."""
        if key in self._settings.names or default < 0:
            return self._settings.find(key, self.token_to_id)
        return default

    def token_to_id(self, name: str) -> int | None:
        """Return the id of a piece, or None if the vocabulary has no such piece."""
        id = int(self._processor.piece_to_id(name))
        return id if self._processor.id_to_piece(id) == name else None

    def is_control(self, id: int) -> bool:
        """Return whether a piece is a control token, which has no text."""
        return bool(self._processor.is_control(id))

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        return list(self._processor.encode(list(texts), return_type="numpy", num_threads=threads))

    def encode_with_offsets(self, text: str, plain: Spans = ()) -> IdsWithOffsets:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        names = (m.span() for m in self._controls.finditer(text) if m.group())
        controls = [span for span in names if not overlaps(*span, plain)]
        for begin, end in (*controls, (len(text), len(text))):
            part = self._processor.encode(text[start:begin], return_type="offset_mapping")
            ids += part["ids"]
            # The library gives empty spans to the first bytes of a character.
            offsets += [(start + a, start + max(b, a + 1)) for a, b in part["offsets"]]
            if begin < end:
                ids.append(self._processor.piece_to_id(text[begin:end]))
                offsets.append((begin, end))
            start = end
        return ids, offsets

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        ids = filter(self._processor.is_control, range(self.vocab_size))
        names = sorted(map(self._processor.id_to_piece, ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(id) for id in ids if 0 <= id < self.vocab_size]))

    def count_bytes(self, ids: Sequence[int]) -> int:
        array = np.asarray(ids, dtype=np.int64)
        valid = array[(array >= 0) & (array < self.vocab_size)]
        return int(self._piece_bytes[valid].sum())

    @cached_property
    def _piece_bytes(self) -> Ids:
        """The number of bytes of text that each id stands for."""
        processor = self._processor
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for id in range(self.vocab_size):
            if processor.is_byte(id):
                lengths[id] = 1
            elif not processor.is_control(id):
                lengths[id] = len(processor.id_to_piece(id).replace("\u2581", " ").encode())
        return lengths

    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(id) for id in range(self.vocab_size)]

    def save(self, folder: Path) -> str:
        self._settings.save(folder)
        (folder / SENTENCEPIECE).write_bytes(self._model)
        return SENTENCEPIECE

    def export(self, folder: Path) -> None:
        export_sentencepiece(self._model, folder, self, self._settings)


def load_sentencepiece(
    model: bytes, settings: TokenizerSettings
) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """Return the tokenizer of a `.model` file with the settings of its folder.

    If tokens were added to the vocabulary, the tokenizer uses the library of `transformers`, so
    that both recognise the added tokens in the same places.
    """
    plain = SentencePieceTokenizer(model, settings)
    added = settings.added_tokens
    size = plain.vocab_size
    names = plain.pieces()
    renames = {t.id: t.content for t in added if t.id < size and names[t.id] != t.content}
    new = [token for token in added if token.id >= size] or settings.missing(plain.token_to_id)
    special = [t for t in added if t.id < size and t.special and not plain.is_control(t.id)]
    prefix = settings.prepend_scheme()
    if not (renames or new or special or prefix):
        return plain
    backend, _ = build_sentencepiece(model, renames=renames, prefix=prefix)
    return HuggingFaceTokenizer(backend.to_str().encode(), settings, (SENTENCEPIECE, model))
