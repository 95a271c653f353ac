"""Export of tokenizers as a Hugging Face `tokenizer.json` that gives the same ids."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.tokenizers.base import Tokenizer
from megalite.tokenizers.special_tokens import TOKENIZER_CONFIG, TokenizerSettings

_SPACE = "\u2581"  # represents a space in SentencePiece
_UNIGRAM = 1
_BPE = 2  # sentencepiece_model.proto's ModelType and Type
_NORMAL = 1
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4


def export_sentencepiece(
    model: bytes, folder: Path, tokenizer: Tokenizer, settings: TokenizerSettings
) -> None:
    """Write a SentencePiece model (unigram or BPE) as `tokenizer.json`."""
    backend, unknown = build_sentencepiece(model)
    export_tokenizer(backend, tokenizer, folder, settings, unk_token=unknown)


def build_sentencepiece(
    model: bytes, *, renames: Mapping[int, str] | None = None, prefix: str | None = None
) -> tuple[Any, str]:
    """Build the `tokenizers.Tokenizer` that gives the ids of a SentencePiece model.

    Args:
        renames: new names of pieces, by id.
        prefix: the prepend scheme of the space before a text: "always", "first" (not after a
            control token) or "never". None means the model's setting.
    Returns:
        the tokenizer, and the name of its unknown token.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import decoders, normalizers, pre_tokenizers

    spec = proto.ModelProto()  # type: ignore[attr-defined]
    spec.ParseFromString(model)
    renames = renames or {}
    names = [renames.get(id, piece.piece) for id, piece in enumerate(spec.pieces)]
    kinds = [_NORMAL if id in renames else p.type for id, p in enumerate(spec.pieces)]
    unknown = [piece.type for piece in spec.pieces].index(_UNKNOWN)
    backend = tokenizers.Tokenizer(_core(spec, names, kinds, unknown))
    rule = spec.normalizer_spec
    steps: list[Any] = []
    if rule.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rule.precompiled_charsmap))
    if rule.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if prefix is None and rule.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    decoding: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix != "never" and (prefix or rule.add_dummy_prefix):
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    for name, kind in zip(names, kinds, strict=True):
        if kind == _CONTROL:
            backend.add_special_tokens(
                [tokenizers.AddedToken(name, normalized=False, special=True)]
            )
    before: list[Any] = []
    if prefix is not None:
        before.append(pre_tokenizers.Metaspace(_SPACE, prepend_scheme=prefix, split=False))
    user_defined = [name for name, kind in zip(names, kinds, strict=True) if kind == _USER_DEFINED]
    if user_defined:  # matched in the normalized text, the longest first, and never split
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = tokenizers.Regex("|".join(map(re.escape, longest_first)))
        before.append(pre_tokenizers.Split(pattern, "isolated"))
    if before:
        backend.pre_tokenizer = pre_tokenizers.Sequence(before) if len(before) > 1 else before[0]
    return backend, names[unknown]


def _core(spec: Any, names: Sequence[str], kinds: Sequence[int], unknown: int) -> Any:
    """Return the BPE or unigram model of a SentencePiece model's pieces."""
    from tokenizers import models

    fallback = spec.trainer_spec.byte_fallback
    scores = [piece.score for piece in spec.pieces]
    if spec.trainer_spec.model_type != _BPE:
        return models.Unigram(list(zip(names, scores, strict=True)), unknown, fallback)
    pieces = zip(names, kinds, scores, strict=True)
    return models.BPE(
        {name: id for id, name in enumerate(names)},
        _merges({name: score for name, kind, score in pieces if kind == _NORMAL}),
        unk_token=names[unknown],
        fuse_unk=True,
        byte_fallback=fallback,
        ignore_merges=_USER_DEFINED in kinds,
    )


def export_bytes(folder: Path, tokenizer: Tokenizer, settings: TokenizerSettings) -> None:
    """Write the byte tokenizer as `tokenizer.json`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    characters = _byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    export_tokenizer(backend, tokenizer, folder, settings)


def export_tokenizer(
    backend: Any, tokenizer: Tokenizer, folder: Path, settings: TokenizerSettings, **names: str
) -> None:
    """Write `tokenizer.json`, with the tokenizer's prefix and suffix, and `tokenizer_config.json`.

    Args:
        backend: the `tokenizers.Tokenizer` of the vocabulary.
        names: names of further special tokens, by key.
    """
    around = list(tokenizer.prefix_ids), list(tokenizer.suffix_ids)
    if prefix_and_suffix_of(backend) != around:
        backend.post_processor = _template(backend, *around)
    backend.save(str(folder / "tokenizer.json"))
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    names |= {f"{key}_token": backend.id_to_token(id) for key, id in ids.items() if id is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **settings.exported_entries,
        **names,
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def prefix_and_suffix_of(backend: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text."""
    encoding = backend.encode("a")
    text = [n for n, number in enumerate(encoding.sequence_ids) if number is not None]
    first, stop = (text[0], text[-1] + 1) if text else (len(encoding.ids), len(encoding.ids))
    return encoding.ids[:first], encoding.ids[stop:]


def _template(backend: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    """Return a post-processor that puts tokens before and after a text."""
    from tokenizers import processors

    names = [[backend.id_to_token(id) for id in ids] for ids in (before, after)]
    single, second = (
        " ".join([f"{name}:{kind}" for name in (*names[0], text, *names[1])])
        for text, kind in (("$A", 0), ("$B", 1))
    )
    tokens = {name: backend.token_to_id(name) for name in (*names[0], *names[1])}
    template = processors.TemplateProcessing(
        single=single, pair=f"{single} {second}", special_tokens=list(tokens.items())
    )
    if type(backend.post_processor).__name__ != "ByteLevel":
        return template
    return processors.Sequence([backend.post_processor, template])


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return the merges of a BPE model: all pairs that form a piece, the best pieces first."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, scores[left], scores[right], left, right))
    merges.sort(key=lambda merge: (merge[0], -merge[1], -merge[2]))
    return [(left, right) for *_, left, right in merges]


def _byte_characters() -> list[str]:
    """Return the character of each byte in byte-level vocabularies (GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
