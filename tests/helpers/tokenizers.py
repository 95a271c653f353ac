"""Tokenizer folders in Hugging Face's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
START, END = "<|im_start|>", "<|im_end|>"


def byte_level() -> Any:
    """Return a byte-level tokenizer without merges: ids 0 to 255 in the order of characters."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE({c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def json_folder(
    folder: Path, files: Mapping[str, Any] | None = None, around: str | None = None
) -> Path:
    """Write a byte-level `tokenizer.json` with BOS 256, EOS 257, and chat tokens 258 and 259.

    Args:
        files: contents of further JSON files, by name.
        around: template of the post-processor, in which "$A" is the text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<s>", "</s>", START, END])
    if around:
        names = [name for name in around.split() if name != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in ({"tokenizer_config.json": NAMES} | dict(files or {})).items():
        (folder / name).write_text(json.dumps(content))
    return folder
