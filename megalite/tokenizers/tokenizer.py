"""Loading of tokenizers: SentencePiece models, Hugging Face's `tokenizer.json`, plain bytes.

Text never becomes a control token: `</s>` in a document is four characters. Callers add BOS and EOS
to documents. Only `encode_with_offsets` recognises control tokens by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalite import files, hub
from megalite.errors import DataError
from megalite.log import logger, replace_nonfinite
from megalite.tokenizers.base import Ids, IdsWithOffsets, Spans, Tokenizer, encode_text
from megalite.tokenizers.export import export_bytes
from megalite.tokenizers.huggingface import HUGGING_FACE, HuggingFaceTokenizer
from megalite.tokenizers.legacy import (
    explain_older_format,
    explain_tiktoken,
    has_older_format,
    is_tiktoken,
)
from megalite.tokenizers.sentencepiece import (
    SENTENCEPIECE,
    SentencePieceTokenizer,
    load_sentencepiece,
)
from megalite.tokenizers.special_tokens import (
    GENERATION_CONFIG,
    TokenizerBase,
    TokenizerSettings,
    end_ids,
)

__all__ = [
    "PROBES",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_round_trip",
    "copy_generation_config",
    "encode_text",
    "load_tokenizer",
]

# Texts that tokenizers often change: repeated, leading and trailing white space; non-ASCII.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two before,  two  inside, three after   ",
    "def f(x):\n    if x:\n\treturn 0x1F\n\n\n        # deep\r\n",
    "\n\n leading and trailing newlines \n",
    "大规模模型的训练，第12345步。",
    "😀 👩‍👩‍👧 naïve café ﬁne ½ Ω العربية",
)

_BYTES = "bytes.json"
# Files of tokenizers in MegaLite or transformers. No other file of a folder is copied.
FILES = (
    *(SENTENCEPIECE, HUGGING_FACE, _BYTES, GENERATION_CONFIG, "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a file, a folder or a model on the hub; "bytes" means plain bytes.

    A file is a `.model` or a `tokenizer.json`.

    Raises:
        DataError: there is no tokenizer, or it cannot be read.
    """
    if str(path) == "bytes":
        return ByteTokenizer()
    file = _find(Path(path))
    settings = TokenizerSettings(file.parent)
    if file.name == _BYTES:
        return ByteTokenizer(settings)
    try:
        if file.suffix == ".json":
            return HuggingFaceTokenizer(file.read_bytes(), settings)
        data = file.read_bytes()
        if is_tiktoken(data):
            raise DataError(explain_tiktoken(file))
        tokenizer = load_sentencepiece(data, settings)
        tokenizer.encode(" ".join(tokenizer.pieces()[:8]))  # a damaged model fails here
        return tokenizer
    except DataError:
        raise
    except Exception as error:  # both libraries raise their own subclasses of Exception
        raise DataError(f"{file}: not a readable tokenizer: {error}") from error


def copy_generation_config(folder: Path, start: Path) -> None:
    """Add the generation_config.json of the model that a run starts from to a tokenizer's folder.

    A model with another tokenizer is ignored, because its ids have other meanings.

    Args:
        folder: the tokenizer's folder.
        start: a model folder, or a checkpoint with its `tokenizer/`.
    """
    source = start / "tokenizer" if (start / "tokenizer").is_dir() else start
    try:
        if load_tokenizer(source).sha256 != load_tokenizer(folder).sha256:
            return
    except DataError:
        return
    content = TokenizerSettings(folder).merge_generation(TokenizerSettings(source))
    if content:
        files.write_json(folder / GENERATION_CONFIG, replace_nonfinite(content))


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder that belong to its tokenizer.

    Raises:
        DataError: one of them is a link, which may lead anywhere in a folder from elsewhere.
    """
    paths = [path for path in sorted(folder.iterdir()) if _belongs(path)]
    for path in paths:
        if path.is_symlink():
            raise DataError(
                f"{path} is a link, which is not followed: its target would be copied into the run "
                "and its checkpoints; replace it by a copy of the file (cp -L)"
            )
    return [path for path in paths if path.is_file()]


def _belongs(path: Path) -> bool:
    return path.name in FILES or path.suffix in (".model", ".spm")


def check_round_trip(tokenizer: Tokenizer, *, lossy: bool = False) -> None:
    """Check that a tokenizer decodes the ids of some probe texts to the same texts.

    Args:
        lossy: If true, warn of a difference instead of raising. BERT's tokenizers need this,
            because they lower the case.
    Raises:
        DataError: a text changes. The message has the first one.
    """
    pairs = [(probe, tokenizer.decode(tokenizer.encode(probe))) for probe in PROBES]
    changed = [(probe, text) for probe, text in pairs if text != probe]
    if not changed:
        return
    loss = f"the tokenizer loses text: {changed[0][0]!r} comes back as {changed[0][1]!r}"
    if not lossy:
        raise DataError(
            f"{loss}; train one with `python -m data_prep train-tokenizer`, which keeps every "
            "character, or allow the loss with --lossy"
        )
    logger.warning("%s (%d of %d probes changed)", loss, len(changed), len(PROBES))


class ByteTokenizer(TokenizerBase):
    """Tokenizer with UTF-8 bytes as ids 0 to 255, which needs no training."""

    bos_id = 256
    eos_id = 257
    vocab_size = 258
    pad_id: int | None = None
    suffix_ids: tuple[int, ...] = ()

    def __init__(self, settings: TokenizerSettings | None = None) -> None:
        self._settings = settings or TokenizerSettings(None)
        self.end_ids = end_ids(self.eos_id, self._settings.ids("eos_token_id"))
        self.prefix_ids = self._settings.begin((), self.bos_id)
        content = {"type": "bytes", "bos_id": 256, "eos_id": 257, "vocab_size": 258}
        self._content = (json.dumps(content) + "\n").encode()
        self.sha256 = hashlib.sha256(self._content).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        del threads
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_with_offsets(self, text: str, plain: Spans = ()) -> IdsWithOffsets:
        del plain  # control tokens have no names
        places = [(n, n + 1) for n, character in enumerate(text) for _ in character.encode()]
        return list(text.encode()), places

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id for id in ids if 0 <= id < 256).decode(errors="replace")

    def count_bytes(self, ids: Sequence[int]) -> int:
        return sum(0 <= id < 256 for id in ids)

    def pieces(self) -> list[str]:
        return [chr(id) for id in range(256)] + ["", ""]

    def save(self, folder: Path) -> str:
        self._settings.save(folder)
        (folder / _BYTES).write_bytes(self._content)
        return _BYTES

    def export(self, folder: Path) -> None:
        export_bytes(folder, self, self._settings)


def _find(path: Path) -> Path:
    """Return the tokenizer's file at a path, or of a model on the hub."""
    if path.is_file():
        if has_older_format(path) and (advice := explain_older_format(path.parent)):
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
            "one of them, a model on the hub (ORG/NAME), or `bytes`"
        )
    # If a folder has both, only tokenizer.json has the tokens that were added later.
    for name in (HUGGING_FACE, SENTENCEPIECE, _BYTES):
        if (path / name).is_file():
            return path / name
    if advice := explain_older_format(path):
        raise DataError(advice)
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return models[0]
    names = ", ".join(model.name for model in models) or "none of them"
    raise DataError(
        f"{path}: a tokenizer folder has {HUGGING_FACE}, {SENTENCEPIECE} or one other .model "
        f"file; got {names}; put the tokenizer's files there, or name another tokenizer"
    )
