"""Names of the folders of tokenized examples: a hash of everything that decides their content."""

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

    A tokenizer and a template count by their content, wherever they are stored. So a run's own copy
    of both finds the examples that the run made from the originals.

    Args:
        tokenizer: None means that one of `model.vocab_size` tokens is learned from the data.
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
        # a text file that is read again has one kind of line end, as Jinja has
        "template": template and re.sub("\r\n?", "\n", template),
        **({"unlabelled": True} if unlabelled else {}),
    }


def cache_folder(cache: str, arguments: dict[str, Any]) -> Path:
    """Return the folder below `cache` for the examples of these arguments, which may not exist."""
    folder = Path(cache) / _hash(json.dumps(arguments, sort_keys=True).encode())[:32]
    # `link_learned` made it; if its target was deleted, the examples are made there again
    return folder.parent / folder.readlink() if folder.is_symlink() else folder


def link_learned(cache: str, arguments: dict[str, Any], folder: Path, made: Tokenizer) -> None:
    """Make examples findable by the tokenizer that was learned for them, which a resume names.

    Args:
        arguments: those that `folder` was made by, without a tokenizer.
        made: the tokenizer in `folder`.
    """
    link = cache_folder(cache, arguments | {"tokenizer": _identity(made)})
    with suppress(OSError):  # it exists, or the file system has no links: then they are made again
        link.symlink_to(folder.name, target_is_directory=True)


def _identity(tokenizer: Tokenizer) -> list[Any]:
    """Return what decides the ids of a text, and a hash of each other file of the tokenizer.

    JSON files count by their content, because a copy may have another order of keys. The template
    is an argument of its own, so the file that a run adds to its copy does not count.
    """
    identity = [tokenizer.sha256, tokenizer.bos_id, tokenizer.eos_id]
    with tempfile.TemporaryDirectory() as place:
        main = tokenizer.save(Path(place))
        others = [p for p in sorted(Path(place).iterdir()) if p.name not in (main, TEMPLATE)]
        return identity + [[path.name, _content_hash(path)] for path in others]


def _content_hash(path: Path) -> str:
    data = path.read_bytes()
    with suppress(ValueError, RecursionError):  # no JSON: its bytes count
        data = json.dumps(files.parse_json(data), sort_keys=True).encode()
    return _hash(data)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
