"""Labelled rows, and folders of examples made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.examples import prepare
from megalite.formats.examples import (
    ExamplesManifest,
    ExampleSplit,
    open_split,
    read_examples_manifest,
)
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.models import run_config

ROWS = [{"text": f"text {n}", "label": n % 3} for n in range(20)]


def write_jsonl(path: str, rows: list[Any]) -> str:
    """Write one line a row, and return `path`. Strings are written as they are."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def make_examples(
    path: str,
    task: str = "classification",
    *,
    tokenizer: str | Path | None = "bytes",
    chat_template: str | None = None,
    seed: int = 1,
    unlabelled: bool = False,
    model: dict[str, Any] | None = None,
    **data: Any,
) -> Path:
    """Make the examples of a small fine-tuning run, and return their folder.

    Args:
        data: keys of finetune.data.
    """
    section = {"path": path, "max_length": 64} | data
    config = run_config(
        model=model or {},
        data={"train": [], "sequence_length": section["max_length"], "seed": seed},
        finetune={"task": task, "data": section},
    )
    return prepare(config, tokenizer=tokenizer, chat_template=chat_template, unlabelled=unlabelled)


def open_examples(folder: Path) -> tuple[ExamplesManifest, dict[str, ExampleSplit]]:
    """Return the manifest and the splits by name."""
    manifest = read_examples_manifest(folder)
    return manifest, {name: open_split(folder, manifest, name) for name in manifest.splits}


def decode_texts(split: ExampleSplit) -> list[str]:
    """Return the texts of a byte-tokenized split."""
    decode = load_tokenizer("bytes").decode
    return [decode(split.ids(n).tolist()) for n in range(len(split))]
