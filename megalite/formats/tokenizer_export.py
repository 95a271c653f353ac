"""Tokenizers in Hugging Face's form: a `tokenizer.json` that gives the same ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_SPACE = "\u2581"  # how SentencePiece writes a space
_UNIGRAM, _BPE = 1, 2  # sentencepiece_model.proto's ModelType and Type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def export_sentencepiece(model: bytes, folder: Path) -> None:
    """Write a SentencePiece model of type unigram or BPE as `tokenizer.json`."""
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    spec = proto.ModelProto()  # type: ignore[attr-defined]
    spec.ParseFromString(model)
    names = [piece.piece for piece in spec.pieces]
    kinds = [piece.type for piece in spec.pieces]
    unknown = kinds.index(_UNKNOWN)
    if spec.trainer_spec.model_type == _BPE:
        core: Any = models.BPE(
            {name: id for id, name in enumerate(names)},
            _merges({p.piece: p.score for p in spec.pieces if p.type == 1}),
            unk_token=names[unknown],
            fuse_unk=True,
            byte_fallback=spec.trainer_spec.byte_fallback,
            ignore_merges=_USER_DEFINED in kinds,
        )
    else:
        scores = [(piece.piece, piece.score) for piece in spec.pieces]
        core = models.Unigram(scores, unknown, spec.trainer_spec.byte_fallback)
    made, rule = tokenizers.Tokenizer(core), spec.normalizer_spec
    steps: list[Any] = []
    if rule.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rule.precompiled_charsmap))
    if rule.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if rule.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    made.normalizer = normalizers.Sequence(steps)
    turns: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rule.add_dummy_prefix:
        turns.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(turns)
    for name, kind in zip(names, kinds, strict=True):
        if kind == _CONTROL:
            made.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True)])
    own = [name for name, kind in zip(names, kinds, strict=True) if kind == _USER_DEFINED]
    if own:  # found in the normalised text, the longest first, and never taken apart
        found = "|".join(re.escape(name) for name in sorted(own, key=len, reverse=True))
        made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(found), "isolated")
    ends = {"bos_token": spec.trainer_spec.bos_id, "eos_token": spec.trainer_spec.eos_id}
    tokens = {key: names[id] for key, id in ends.items() if id >= 0}
    _save(made, folder, tokens | {"unk_token": names[unknown]})


def export_bytes(folder: Path) -> None:
    """Write the tokenizer of plain bytes as `tokenizer.json`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    characters = _byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    _save(made, folder, {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"})


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """BPE's merges in order: each way to put a piece together, the best pieces first."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, scores[left], scores[right], left, right))
    found.sort(key=lambda merge: (merge[0], -merge[1], -merge[2]))
    return [(left, right) for *_, left, right in found]


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def _save(made: Any, folder: Path, tokens: dict[str, str]) -> None:
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
