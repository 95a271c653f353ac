"""The cache of tokenized examples: a folder's name is a hash of everything that decides them."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.chat import TEMPLATE
from data_prep.rows import Source
from megalite import files
from megalite.config import RunConfig
from megalite.formats.examples import FORMAT
from megalite.tokenizers.tokenizer import Tokenizer


def cache_arguments(
    config: RunConfig,
    source: Source,
    tokenizer: Tokenizer | None,
    template: str | None,
    *,
    unlabelled: bool,
) -> dict[str, Any]:
    """Return everything that decides the examples of a run, as JSON.

    The content of the tokenizer and the template counts, not their paths. So a run's copies of both
    find the examples that were made with the originals.

    Args:
        tokenizer: None means that one of `model.vocab_size` tokens is trained on the data.
    """
    assert config.finetune is not None
    data = config.finetune.data
    origins = {"train": data.train_split, "valid": data.valid_split, "test": data.test_split}
    return {
        "format": FORMAT,
        "task": config.finetune.task,
        "data": data.model_dump(mode="json", exclude={"cache", "tokenizer", "chat_template"}),
        "seed": config.data.seed,
        "architecture": config.model.architecture,
        "sources": {key: source.identity(split) for key, split in origins.items() if split},
        "tokenizer": config.model.vocab_size if tokenizer is None else _identity(tokenizer),
        # Reading a text file changes line ends to newlines.
        "template": template and re.sub("\r\n?", "\n", template),
        **({"unlabelled": True} if unlabelled else {}),
    }


def cache_folder(cache: str, arguments: dict[str, Any]) -> Path:
    """Return the folder in `cache` for the examples of these arguments. It need not exist."""
    folder = Path(cache) / _hash(json.dumps(arguments, sort_keys=True).encode())[:32]
    # A link was made by `link_by_tokenizer`. Its target is made again if it was deleted.
    return folder.parent / folder.readlink() if folder.is_symlink() else folder


def link_by_tokenizer(
    cache: str, arguments: dict[str, Any], folder: Path, tokenizer: Tokenizer
) -> None:
    """Link examples to the tokenizer that was trained for them, which a resume uses.

    Args:
        arguments: the arguments of `folder`, without a tokenizer.
        tokenizer: the tokenizer in `folder`.
    """
    link = cache_folder(cache, arguments | {"tokenizer": _identity(tokenizer)})
    with suppress(OSError):  # it exists, or the file system has no links: a resume makes a copy
        link.symlink_to(folder.name, target_is_directory=True)


def _identity(tokenizer: Tokenizer) -> list[Any]:
    """Return the values that decide the ids of a text, and hashes of the tokenizer's other files.

    The content of JSON files counts, because a copy may have another order of keys. The template is
    a separate argument, so the file that a run adds to its copy does not count.
    """
    identity = [tokenizer.sha256, tokenizer.bos_id, tokenizer.eos_id]
    with tempfile.TemporaryDirectory() as place:
        main = tokenizer.save(Path(place))
        others = [p for p in sorted(Path(place).iterdir()) if p.name not in (main, TEMPLATE)]
        return identity + [[path.name, _content_hash(path)] for path in others]


def _content_hash(path: Path) -> str:
    data = path.read_bytes()
    with suppress(ValueError, RecursionError):  # not JSON
        data = json.dumps(files.parse_json(data), sort_keys=True).encode()
    return _hash(data)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
