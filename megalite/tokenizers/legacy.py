"""Tokenizer folders of older formats, and commands that convert them to a tokenizer.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megalite.errors import DataError
from megalite.tokenizers.export import build_sentencepiece

_CONVERT = (
    'python -c "from transformers import {name} as T; '
    "T.from_pretrained('{folder}').save_pretrained('{folder}')\""
)
# A file of the format, the format's name, and the class that reads it without a config.json.
_FORMATS = (
    ("tekken.json", "Mistral's tekken format", "AutoTokenizer"),
    ("sentencepiece.bpe.model", "XLM-RoBERTa's format, whose ids differ", "XLMRobertaTokenizer"),
    ("merges.txt", "GPT-2's format", "GPT2Tokenizer"),
    ("vocab.txt", "BERT's format", "BertTokenizer"),
)
_UNIGRAM = 1
_NORMAL = 1  # sentencepiece_model.proto's ModelType and Type
_FILES = ("tekken.json", "merges.txt", "vocab.json", "vocab.txt", "source.spm", "target.spm")


def has_older_format(path: Path) -> bool:
    """Return whether a file belongs to one of the older formats."""
    return path.name in _FILES or path.suffix == ".tiktoken"


def explain_older_format(folder: Path) -> str | None:
    """Return the name of a folder's older format and how to convert it; None if it has none."""
    has_class = _has_class(folder)
    if (folder / "source.spm").is_file():
        return (
            f"{folder} holds Marian's two models, source.spm and target.spm; make a single "
            "tokenizer.json for sources and answers with\n"
            'python -c "from megalite.tokenizers.legacy import convert_marian as c; '
            f"c('{folder}')\""
        )
    for file, kind, name in _FORMATS:
        if (folder / file).is_file():
            command = _CONVERT.format(name="AutoTokenizer" if has_class else name, folder=folder)
            return (
                f"{folder} holds {file}, which is {kind}; make its tokenizer.json with "
                f"transformers (pip install megalite[hf]):\n{command}"
            )
    if tiktoken := next(iter(sorted(folder.glob("*.tiktoken"))), None):
        return explain_tiktoken(tiktoken)
    return None


def is_tiktoken(data: bytes) -> bool:
    """Return whether a file has tiktoken's format: a base64 token and its rank on each line."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data[:400]) is not None


def explain_tiktoken(file: Path) -> str:
    """Return how to convert a tiktoken file."""
    output = file.parent / "tokenizer.json"
    return (
        f"{file} is tiktoken's format, which contains neither the pattern that splits words nor "
        "the special tokens. Use a folder of the model with a tokenizer.json if there is one; "
        "otherwise pass pattern and extra_special_tokens of the model's code to (pip install "
        "tiktoken blobfile megalite[hf])\n"
        'python -c "from transformers.convert_slow_tokenizer import TikTokenConverter as C; '
        f"C('{file}').converted().save('{output}')\""
    )


def _has_class(folder: Path) -> bool:
    """Return whether a folder's files name the tokenizer's class or the model's type."""
    for name, key in (("tokenizer_config.json", "tokenizer_class"), ("config.json", "model_type")):
        try:
            if json.loads((folder / name).read_bytes())[key]:
                return True
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
    return False


def convert_marian(folder: str | Path) -> None:
    """Write a `tokenizer.json` for a Marian folder.

    Source texts get the ids and the EOS that `transformers` gives them, and every id decodes to its
    text. Target texts are split by the source model, so train only models with one vocabulary.

    Raises:
        DataError: a file is missing or invalid.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import models

    folder = Path(folder)
    try:
        vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_bytes())
        source = (folder / "source.spm").read_bytes()
        names = sorted(vocabulary, key=vocabulary.__getitem__)
        spec = proto.ModelProto()  # type: ignore[attr-defined]
        spec.ParseFromString(source)
        if sorted(vocabulary.values()) != list(range(len(names))):
            raise ValueError("the ids in vocab.json are not consecutive")
        unknown = vocabulary["<unk>"]
        if spec.trainer_spec.model_type != _UNIGRAM:
            raise ValueError("source.spm is not a unigram model")
        backend, _ = build_sentencepiece(source)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder} is not a readable Marian folder: {error}") from error
    except Exception as error:  # protobuf's exceptions
        raise DataError(f"{folder}/source.spm cannot be read: {error}") from error
    scores = {piece.piece: piece.score for piece in spec.pieces if piece.type == _NORMAL}
    # Pieces that the source model lacks get a score so low that they are chosen last.
    least = min(scores.values(), default=0.0) - 10.0
    core: Any = models.Unigram(
        [(name, scores.get(name, least - 100.0)) for name in names], unknown, False
    )
    joint = tokenizers.Tokenizer(core)
    joint.normalizer = backend.normalizer
    joint.decoder = backend.decoder
    if backend.pre_tokenizer is not None:
        joint.pre_tokenizer = backend.pre_tokenizer
    special = [name for name in ("</s>", "<unk>", "<pad>") if name in vocabulary]
    codes = [name for name in names if re.fullmatch(r">>\S+<<", name)]
    joint.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False) for name in (*special, *codes)]
    )
    joint.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    joint.save(str(folder / "tokenizer.json"))
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_bytes()) if config.is_file() else {}
    tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "bos_token": None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
