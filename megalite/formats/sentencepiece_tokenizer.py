"""SentencePiece models."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megalite.formats.tokenizer_base import Ids, Placed, Spans, overlaps
from megalite.formats.tokenizer_export import export_sentencepiece

SENTENCEPIECE = "tokenizer.model"


class SentencePieceTokenizer:
    """A SentencePiece model, given as the content of its `.model` file.

    The library writes a space as U+2581, so that character in a text comes back as a space.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.get_piece_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id = bos if bos >= 0 else None
        self.eos_id = eos if eos >= 0 else None
        self.sha256 = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        return list(self._processor.encode(list(texts), return_type="numpy", num_threads=threads))

    def encode_with_offsets(self, text: str, plain: Spans = ()) -> Placed:
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        start = 0
        controls = (m.span() for m in self._controls.finditer(text) if m.group())
        kept = [span for span in controls if not overlaps(*span, plain)]
        for begin, end in (*kept, (len(text), len(text))):
            found = self._processor.encode(text[start:begin], return_type="offset_mapping")
            ids += found["ids"]
            # the first bytes of a character end where they begin
            places += [(start + a, start + max(b, a + 1)) for a, b in found["offsets"]]
            if begin < end:
                ids.append(self._processor.piece_to_id(text[begin:end]))
                places.append((begin, end))
            start = end
        return ids, places

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        ids = filter(self._processor.is_control, range(self.vocab_size))
        names = sorted(map(self._processor.id_to_piece, ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(id) for id in ids]))

    def count_bytes(self, ids: Sequence[int]) -> int:
        return int(self._piece_bytes[np.asarray(ids, dtype=np.int64)].sum())

    @cached_property
    def _piece_bytes(self) -> Ids:
        """Bytes of text each id stands for."""
        processor, lengths = self._processor, np.zeros(self.vocab_size, dtype=np.int32)
        for id in range(self.vocab_size):
            if processor.is_byte(id):
                lengths[id] = 1
            elif not processor.is_control(id):
                lengths[id] = len(processor.id_to_piece(id).replace("\u2581", " ").encode())
        return lengths

    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(id) for id in range(self.vocab_size)]

    def save(self, folder: Path) -> str:
        (folder / SENTENCEPIECE).write_bytes(self._model)
        return SENTENCEPIECE

    def export(self, folder: Path) -> None:
        export_sentencepiece(self._model, folder)
