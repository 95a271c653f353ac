"""Text to token ids and back: SentencePiece models, Hugging Face `tokenizer.json`, plain bytes.

Text never turns into a control token: `</s>` in a document is four characters. BOS and EOS are put
around documents by whoever asks for them. `encode_with_offsets` alone finds control tokens by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from megalite.errors import DataError
from megalite.formats.tokenizer_export import export_bytes, export_sentencepiece
from megalite.log import logger

Ids: TypeAlias = npt.NDArray[np.int32]
Placed: TypeAlias = "tuple[list[int], list[tuple[int, int]]]"

# What tokenizers lose most often: runs and edges of white space, newlines, bytes beyond ASCII.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two before,  two  inside, three after   ",
    "def f(x):\n    if x:\n\treturn 0x1F\n\n\n        # deep\r\n",
    "\n\n leading and trailing newlines \n",
    "大规模模型的训练，第12345步。",
    "😀 👩‍👩‍👧 naïve café ﬁne ½ Ω العربية",
)

_SENTENCEPIECE, _HUGGING_FACE, _BYTES = "tokenizer.model", "tokenizer.json", "bytes.json"
_HUGGING_FACE_CONFIG = "tokenizer_config.json"
# What belongs to a tokenizer, here or in transformers; nothing else of its folder is copied.
FILES = (
    *(_SENTENCEPIECE, _HUGGING_FACE, _BYTES, _HUGGING_FACE_CONFIG),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt"),
)
# Names in use for the tokens that begin and end a document, where no tokenizer_config.json says;
# BERT's are the last.
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[CLS]")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[SEP]")


class Tokenizer(Protocol):
    """Ids lie in [0, vocab_size); bos_id and eos_id are None where the vocabulary has none."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def sha256(self) -> str:
        """The hash of the file that `save` writes."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS."""

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        """The ids of each text; equal whatever the number of threads."""

    def encode_with_offsets(self, text: str) -> Placed:
        """The ids of a text in which names of control tokens are those tokens.

        Beside them the characters each stands for, from and to; ids that share a character all
        name it.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; BOS, EOS and other control tokens have none."""

    def count_bytes(self, ids: Sequence[int]) -> int:
        """Bytes of UTF-8 text that ids stand for; of a character cut at an edge, those within."""

    def pieces(self) -> list[str]:
        """What each id is called in the vocabulary; holes are empty."""

    def save(self, folder: Path) -> str:
        """Write the tokenizer's file into an existing folder and return the file's name."""

    def export(self, folder: Path) -> None:
        """Write it as Hugging Face's `tokenizer.json` and `tokenizer_config.json`."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a `.model` file, a `tokenizer.json`, a folder with one of them, or "bytes".

    Raises:
        DataError: nothing there, or nothing that can be read.
    """
    if str(path) == "bytes":
        return ByteTokenizer()
    file = _find(Path(path))
    if file.name == _BYTES:
        return ByteTokenizer()
    try:
        if file.suffix == ".json":
            return HuggingFaceTokenizer(file)
        tokenizer = SentencePieceTokenizer(file.read_bytes())
        tokenizer.encode(" ".join(tokenizer.pieces()[:8]))  # a damaged model fails here
        return tokenizer
    except DataError:
        raise
    except Exception as error:  # both libraries raise bare Exception subclasses of their own
        raise DataError(f"{file}: not a tokenizer that can be read: {error}") from error


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that belong to its tokenizer.

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

    def encode_with_offsets(self, text: str) -> Placed:
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        start = 0
        for number, part in enumerate(self._controls.split(text)):  # every second is a name
            if number % 2:
                ids.append(self._processor.piece_to_id(part))
                places.append((start, start + len(part)))
            else:
                found = self._processor.encode(part, return_type="offset_mapping")
                ids += found["ids"]
                # the first bytes of a character end where they begin
                places += [(start + a, start + max(b, a + 1)) for a, b in found["offsets"]]
            start += len(part)
        return ids, places

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        ids = filter(self._processor.is_control, range(self.vocab_size))
        names = sorted(map(self._processor.id_to_piece, ids), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

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
        (folder / _SENTENCEPIECE).write_bytes(self._model)
        return _SENTENCEPIECE

    def export(self, folder: Path) -> None:
        export_sentencepiece(self._model, folder)


class HuggingFaceTokenizer:
    """A `tokenizer.json`; BOS and EOS by the `tokenizer_config.json` beside it, or by their names.

    `encode_batch` uses as many threads as RAYON_NUM_THREADS says: the library has no other way.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        config = path.with_name(_HUGGING_FACE_CONFIG)
        self._files = {file.name: file.read_bytes() for file in (config,) if file.exists()}
        self._files[_HUGGING_FACE] = data = path.read_bytes()
        self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(data)
        self._with_controls: Any = tokenizers.Tokenizer.from_buffer(data)
        for made in (self._tokenizer, self._with_controls):
            made.no_truncation()
            made.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text, that is: not as control tokens
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids, default=-1) + 1  # ids may have holes
        self.bos_id = self._control("bos_token", _BOS_NAMES)
        self.eos_id = self._control("eos_token", _EOS_NAMES)
        self.sha256 = hashlib.sha256(data).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        del threads
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]

    def encode_with_offsets(self, text: str) -> Placed:
        found = self._with_controls.encode(text, add_special_tokens=False)
        return list(found.ids), list(found.offsets)

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
        decoder = json.loads(self._files[_HUGGING_FACE]).get("decoder") or {}
        kinds = [decoder, *decoder.get("decoders", ())]
        return any(kind.get("type") == "ByteLevel" for kind in kinds)

    def pieces(self) -> list[str]:
        return [self._tokenizer.id_to_token(id) or "" for id in range(self.vocab_size)]

    def save(self, folder: Path) -> str:
        for name, data in self._files.items():
            (folder / name).write_bytes(data)
        return _HUGGING_FACE

    def export(self, folder: Path) -> None:
        self.save(folder)
        config = folder / _HUGGING_FACE_CONFIG
        if not config.exists():
            names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
            told = {k: self._tokenizer.id_to_token(id) for k, id in names.items() if id is not None}
            content = {"tokenizer_class": "PreTrainedTokenizerFast", **told}
            config.write_text(json.dumps(content, indent=2) + "\n")

    def _control(self, key: str, names: Sequence[str]) -> int | None:
        config = json.loads(self._files.get(_HUGGING_FACE_CONFIG, b"{}"))
        if key in config:
            token = config[key]
            name = token["content"] if isinstance(token, dict) else token
            names = (name,) if name else ()
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((int(id) for id in ids if id is not None), None)


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255; nothing to train, which suits tests and unseen scripts."""

    bos_id, eos_id, vocab_size = 256, 257, 258

    def __init__(self) -> None:
        content = {"type": "bytes", "bos_id": 256, "eos_id": 257, "vocab_size": 258}
        self._content = (json.dumps(content) + "\n").encode()
        self.sha256 = hashlib.sha256(self._content).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[Ids]:
        del threads
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_with_offsets(self, text: str) -> Placed:
        places = [(n, n + 1) for n, character in enumerate(text) for _ in character.encode()]
        return list(text.encode()), places

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id for id in ids if id < 256).decode(errors="replace")

    def count_bytes(self, ids: Sequence[int]) -> int:
        return sum(id < 256 for id in ids)

    def pieces(self) -> list[str]:
        return [chr(id) for id in range(256)] + ["", ""]

    def save(self, folder: Path) -> str:
        (folder / _BYTES).write_bytes(self._content)
        return _BYTES

    def export(self, folder: Path) -> None:
        export_bytes(folder)


def _find(path: Path) -> Path:
    """The tokenizer's file that a path means."""
    if path.is_file():
        if path.suffix in (".model", ".json"):
            return path
        raise DataError(
            f"{path}: a tokenizer is a .model file, a tokenizer.json, a folder with one, or `bytes`"
        )
    if not path.is_dir():
        raise DataError(
            f"there is no tokenizer {path}; give a .model file, a tokenizer.json, a folder with "
            "one of them, or `bytes`"
        )
    # tokenizer.json first: where a folder has both, it also holds the tokens added later
    for name in (_HUGGING_FACE, _SENTENCEPIECE, _BYTES):
        if (path / name).is_file():
            return path / name
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return models[0]
    found = ", ".join(model.name for model in models) or "none of them"
    raise DataError(
        f"{path}: a tokenizer folder holds {_HUGGING_FACE}, {_SENTENCEPIECE} or one other .model "
        f"file; found {found}"
    )
