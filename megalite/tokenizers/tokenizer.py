"""Text to token ids and back: SentencePiece models, Hugging Face `tokenizer.json`, plain bytes.

Text never turns into a control token: `</s>` in a document is four characters. BOS and EOS are put
around documents by whoever requires them. `encode_with_offsets` alone finds control tokens by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalite import files, hub
from megalite.errors import DataError
from megalite.log import finite, logger
from megalite.tokenizers.base import Ids, Placed, Spans, Tokenizer, encode_text
from megalite.tokenizers.export import export_bytes
from megalite.tokenizers.huggingface import HUGGING_FACE, HuggingFaceTokenizer
from megalite.tokenizers.legacy import explain_tiktoken, find_older, is_older, is_tiktoken
from megalite.tokenizers.sentencepiece import (
    SENTENCEPIECE,
    SentencePieceTokenizer,
    load_sentencepiece,
)
from megalite.tokenizers.special_tokens import GENERATION_CONFIG, Companions, TokenizerBase, end_ids

__all__ = [
    "PROBES",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_round_trip",
    "encode_text",
    "keep_ends",
    "load_tokenizer",
]

# Texts that tokenizers often change: runs and edges of white space, newlines, beyond ASCII.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two before,  two  inside, three after   ",
    "def f(x):\n    if x:\n\treturn 0x1F\n\n\n        # deep\r\n",
    "\n\n leading and trailing newlines \n",
    "大规模模型的训练，第12345步。",
    "😀 👩‍👩‍👧 naïve café ﬁne ½ Ω العربية",
)

_BYTES = "bytes.json"
# Files of a tokenizer, here or in transformers; nothing else in its folder is copied.
FILES = (
    *(SENTENCEPIECE, HUGGING_FACE, _BYTES, GENERATION_CONFIG, "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a file, a folder, a model on the hub, or "bytes".

    Files are `.model` and `tokenizer.json`.

    Raises:
        DataError: nothing there, or nothing that can be read.
    """
    if str(path) == "bytes":
        return ByteTokenizer()
    file = _find(Path(path))
    companions = Companions(file.parent)
    if file.name == _BYTES:
        return ByteTokenizer(companions)
    try:
        if file.suffix == ".json":
            return HuggingFaceTokenizer(file.read_bytes(), companions)
        data = file.read_bytes()
        if is_tiktoken(data):
            raise DataError(explain_tiktoken(file))
        tokenizer = load_sentencepiece(data, companions)
        tokenizer.encode(" ".join(tokenizer.pieces()[:8]))  # a damaged model fails here
        return tokenizer
    except DataError:
        raise
    except Exception as error:  # both libraries raise bare Exception subclasses of their own
        raise DataError(f"{file}: not a tokenizer that can be read: {error}") from error


def keep_ends(folder: Path, start: Path) -> None:
    """Keep in a tokenizer's folder what ends a text by the model that training starts from.

    Nothing is kept of a model with another tokenizer, whose ids mean something else.

    Args:
        folder: the tokenizer's; its `generation_config.json` is written.
        start: a model folder, or a checkpoint with its `tokenizer/`.
    """
    place = start / "tokenizer" if (start / "tokenizer").is_dir() else start
    try:
        if load_tokenizer(place).sha256 != load_tokenizer(folder).sha256:
            return
    except DataError:
        return
    content = Companions(folder).generation_with(Companions(place))
    if content:
        files.write_json(folder / GENERATION_CONFIG, finite(content))


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder that belong to its tokenizer.

    Raises:
        DataError: one of them is a link, which in a folder from elsewhere may lead anywhere.
    """
    found = [path for path in sorted(folder.iterdir()) if _belongs(path)]
    for path in found:
        if path.is_symlink():
            raise DataError(
                f"{path} is a link, which is not followed: what it leads to would be copied into "
                "the run and its checkpoints; put a copy of the file in its place (cp -L)"
            )
    return [path for path in found if path.is_file()]


def _belongs(path: Path) -> bool:
    return path.name in FILES or path.suffix in (".model", ".spm")


def check_round_trip(tokenizer: Tokenizer, *, lossy: bool = False) -> None:
    """Encode and decode texts that tokenizers often change.

    Args:
        lossy: say what is lost and go on, as BERT's tokenizers need, which lower the case.

    Raises:
        DataError: the first text that does not come back as it was.
    """
    pairs = [(probe, tokenizer.decode(tokenizer.encode(probe))) for probe in PROBES]
    lost = [(probe, found) for probe, found in pairs if found != probe]
    if not lost:
        return
    loss = f"the tokenizer loses text: {lost[0][0]!r} comes back as {lost[0][1]!r}"
    if not lossy:
        raise DataError(
            f"{loss}; train one with `python -m data_prep train-tokenizer`, which keeps every "
            "character, or allow the loss with --lossy"
        )
    logger.warning("%s (%d of %d probes changed)", loss, len(lost), len(PROBES))


class ByteTokenizer(TokenizerBase):
    """UTF-8 bytes as ids 0 to 255; nothing to train, which suits tests and unseen scripts."""

    bos_id = 256
    eos_id = 257
    vocab_size = 258
    pad_id: int | None = None
    suffix_ids: tuple[int, ...] = ()

    def __init__(self, companions: Companions | None = None) -> None:
        self._companions = companions or Companions(None)
        self.end_ids = end_ids(self.eos_id, self._companions.ids("eos_token_id"))
        self.prefix_ids = self._companions.begin((), self.bos_id)
        content = {"type": "bytes", "bos_id": 256, "eos_id": 257, "vocab_size": 258}
        self._content = (json.dumps(content) + "\n").encode()
        self.sha256 = hashlib.sha256(self._content).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        del threads
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_with_offsets(self, text: str, plain: Spans = ()) -> Placed:
        del plain  # there are no names of control tokens
        places = [(n, n + 1) for n, character in enumerate(text) for _ in character.encode()]
        return list(text.encode()), places

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id for id in ids if 0 <= id < 256).decode(errors="replace")

    def count_bytes(self, ids: Sequence[int]) -> int:
        return sum(0 <= id < 256 for id in ids)

    def pieces(self) -> list[str]:
        return [chr(id) for id in range(256)] + ["", ""]

    def save(self, folder: Path) -> str:
        self._companions.save(folder)
        (folder / _BYTES).write_bytes(self._content)
        return _BYTES

    def export(self, folder: Path) -> None:
        export_bytes(folder, self, self._companions)


def _find(path: Path) -> Path:
    """Return the file of the tokenizer that a path names."""
    if path.is_file():
        if is_older(path) and (advice := find_older(path.parent)):
            raise DataError(advice)
        if path.suffix in (".model", ".json"):
            return path
        raise DataError(
            f"{path}: a tokenizer is a .model file, a tokenizer.json, a folder with one, or `bytes`"
        )
    if (downloaded := hub.find_tokenizer(path)) is not None:
        path = downloaded
    if not path.is_dir():
        raise DataError(
            f"there is no tokenizer {path}; give a .model file, a tokenizer.json, a folder with "
            "one of them, a model of the hub (ORG/NAME), or `bytes`"
        )
    # tokenizer.json first: if a folder has both, it also holds the tokens added later
    for name in (HUGGING_FACE, SENTENCEPIECE, _BYTES):
        if (path / name).is_file():
            return path / name
    if advice := find_older(path):
        raise DataError(advice)
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return models[0]
    found = ", ".join(model.name for model in models) or "none of them"
    raise DataError(
        f"{path}: a tokenizer folder holds {HUGGING_FACE}, {SENTENCEPIECE} or one other .model "
        f"file; found {found}; put the tokenizer's files there, or name another tokenizer"
    )
