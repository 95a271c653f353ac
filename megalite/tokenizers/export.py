"""Tokenizers in Hugging Face's form: a `tokenizer.json` that gives the same ids."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.tokenizers.base import Tokenizer
from megalite.tokenizers.special_tokens import TOKENIZER_CONFIG, Companions

_SPACE = "\u2581"  # how SentencePiece writes a space
_UNIGRAM = 1
_BPE = 2  # sentencepiece_model.proto's ModelType and Type
_NORMAL = 1
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4


def export_sentencepiece(
    model: bytes, folder: Path, tokenizer: Tokenizer, companions: Companions
) -> None:
    """Write a SentencePiece model of type unigram or BPE as `tokenizer.json`."""
    made, unknown = build_sentencepiece(model)
    export_tokenizer(made, tokenizer, folder, companions, unk_token=unknown)


def build_sentencepiece(
    model: bytes, *, renames: Mapping[int, str] | None = None, prefix: str | None = None
) -> tuple[Any, str]:
    """Build the `tokenizers.Tokenizer` that gives the ids of a SentencePiece model.

    Args:
        renames: other names of pieces, by id.
        prefix: which text gets a space before it: "always", "first" (not what follows a control
            token) or "never". None: by the model's settings.
    Returns:
        The tokenizer, and the name of its unknown token.
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
    made = tokenizers.Tokenizer(_core(spec, names, kinds, unknown))
    rule = spec.normalizer_spec
    steps: list[Any] = []
    if rule.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rule.precompiled_charsmap))
    if rule.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if prefix is None and rule.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    made.normalizer = normalizers.Sequence(steps)
    turns: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix != "never" and (prefix or rule.add_dummy_prefix):
        turns.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(turns)
    for name, kind in zip(names, kinds, strict=True):
        if kind == _CONTROL:
            made.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True)])
    before: list[Any] = []
    if prefix is not None:
        before.append(pre_tokenizers.Metaspace(_SPACE, prepend_scheme=prefix, split=False))
    own = [name for name, kind in zip(names, kinds, strict=True) if kind == _USER_DEFINED]
    if own:  # found in the normalised text, the longest first, and never split
        found = "|".join(re.escape(name) for name in sorted(own, key=len, reverse=True))
        before.append(pre_tokenizers.Split(tokenizers.Regex(found), "isolated"))
    if before:
        made.pre_tokenizer = pre_tokenizers.Sequence(before) if len(before) > 1 else before[0]
    return made, names[unknown]


def _core(spec: Any, names: Sequence[str], kinds: Sequence[int], unknown: int) -> Any:
    """Return the BPE or unigram model of SentencePiece's pieces under their names."""
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


def export_bytes(folder: Path, tokenizer: Tokenizer, companions: Companions) -> None:
    """Write the tokenizer of plain bytes as `tokenizer.json`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    characters = _byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    export_tokenizer(made, tokenizer, folder, companions)


def export_tokenizer(
    made: Any, tokenizer: Tokenizer, folder: Path, companions: Companions, **names: str
) -> None:
    """Write `tokenizer.json` with what stands around a text, and `tokenizer_config.json`.

    Args:
        made: the `tokenizers.Tokenizer` of the vocabulary.
        names: those of further special tokens, by their keys.
    """
    around = list(tokenizer.prefix_ids), list(tokenizer.suffix_ids)
    if around_text(made) != around:
        made.post_processor = _template(made, *around)
    made.save(str(folder / "tokenizer.json"))
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    names |= {f"{key}_token": made.id_to_token(id) for key, id in ids.items() if id is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **companions.carried,
        **names,
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def around_text(made: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text."""
    found = made.encode("a")
    text = [n for n, number in enumerate(found.sequence_ids) if number is not None]
    first, stop = (text[0], text[-1] + 1) if text else (len(found.ids), len(found.ids))
    return found.ids[:first], found.ids[stop:]


def _template(made: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    """Return a post-processor that puts tokens before and after a text."""
    from tokenizers import processors

    names = [[made.id_to_token(id) for id in ids] for ids in (before, after)]
    single, second = (
        " ".join([f"{name}:{kind}" for name in (*names[0], text, *names[1])])
        for text, kind in (("$A", 0), ("$B", 1))
    )
    tokens = {name: made.token_to_id(name) for name in (*names[0], *names[1])}
    template = processors.TemplateProcessing(
        single=single, pair=f"{single} {second}", special_tokens=list(tokens.items())
    )
    if type(made.post_processor).__name__ != "ByteLevel":
        return template
    return processors.Sequence([made.post_processor, template])


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return BPE's merges in order: each way to put a piece together, the best pieces first."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            if left in scores and right in scores:
                found.append((-score, scores[left], scores[right], left, right))
    found.sort(key=lambda merge: (merge[0], -merge[1], -merge[2]))
    return [(left, right) for *_, left, right in found]


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in byte-level vocabularies (GPT-2's
    bytes_to_unicode).
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]
