"""Tokenizer folders in Hugging Face's form."""

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
    """Return bytes as ids 0 to 255, in the order of their characters, and no merges."""
    made = tokenizers.Tokenizer(
        models.BPE({c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def json_folder(
    folder: Path, files: Mapping[str, Any] | None = None, around: str | None = None
) -> Path:
    """Return a byte-level `tokenizer.json` with BOS 256, EOS 257, and a chat's marks 258 and 259.

    Args:
        files: contents of JSON files next to it.
        around: what its post-processor puts around a text, "$A".
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = byte_level()
    made.add_special_tokens(["<s>", "</s>", START, END])
    if around:
        names = [name for name in around.split() if name != "$A"]
        made.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(name, made.token_to_id(name)) for name in names]
        )
    made.save(str(folder / "tokenizer.json"))
    for name, content in ({"tokenizer_config.json": NAMES} | dict(files or {})).items():
        (folder / name).write_text(json.dumps(content))
    return folder
