"""Labelled rows, and the folder of examples that a small run file makes of them."""

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


def jsonl(path: str, found: list[Any]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps(one) for one in found]
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def make(
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
    section = {"path": path, "max_length": 64} | data
    config = run_config(
        model=model or {},
        data={"train": [], "sequence_length": section["max_length"], "seed": seed},
        finetune={"task": task, "data": section},
    )
    return prepare(config, tokenizer=tokenizer, chat_template=chat_template, unlabelled=unlabelled)


def opened(folder: Path) -> tuple[ExamplesManifest, dict[str, ExampleSplit]]:
    manifest = read_examples_manifest(folder)
    return manifest, {name: open_split(folder, manifest, name) for name in manifest.splits}


def texts(split: ExampleSplit) -> list[str]:
    decode = load_tokenizer("bytes").decode
    return [decode(split.ids(n).tolist()) for n in range(len(split))]
