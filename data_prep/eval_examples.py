"""Rows that a fine-tuned model is evaluated on, or whose labels it predicts."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.examples import prepare
from data_prep.row_files import CHOOSE
from megalite import files
from megalite.config import RunConfig
from megalite.errors import DataError, MegaLiteError
from megalite.formats.examples import read_examples_manifest


def prepare_again(
    config: RunConfig,
    tokenizer: Path,
    path: str | None,
    first: bool,
    gather: Callable[[Any], Sequence[Any]],
    *,
    predictions: Path | None = None,
) -> tuple[Path, str]:
    """Return the examples that a fine-tuned model is evaluated on, and their split. All ranks call
    it.

    Args:
        path: a file of other rows. None means the run's own data: the test split, else valid, else
            train.
        first: whether this is the rank that makes the examples.
        gather: a function that returns the value of each rank, on all ranks.
        predictions: the file for the answers. If it is given, rows of `path` may lack a label, and
            unusable rows are skipped.
    Raises:
        UserError: data that cannot be used, on every rank.
    """
    made: tuple[Path | None, MegaLiteError | None] = (None, None)
    if first:
        try:
            made = _prepare(config, tokenizer, path, predictions), None
        except MegaLiteError as error:
            made = None, error
    folder, fault = gather(made)[0]
    if fault is not None:
        raise fault
    splits = read_examples_manifest(folder).splits
    return folder, next(split for split in ("test", "valid", "train") if split in splits)


def _prepare(config: RunConfig, tokenizer: Path, path: str | None, answers: Path | None) -> Path:
    assert config.finetune is not None
    data = config.finetune.data.model_copy(update={"tokenizer": None})
    unlabelled = answers is not None and path is not None
    if answers is not None:
        place = Path(path or data.path)
        reads = [place, *(place.iterdir() if place.is_dir() else ())]
        files.check_target(answers, reads, option="--predictions")
    if path is not None:
        if Path(path).is_dir() and any(Path(path).glob("*.idx")):
            raise DataError(
                f"--data {path}: these are shards; a fine-tuned model is measured on rows, as its "
                f"run was ({data.path}): give a file of them, or remove it"
            )
        fractions = ("valid_split", "test_split", "valid_fraction", "test_fraction")
        limit = sys.maxsize if unlabelled else data.max_bad_rows
        changes = {**dict.fromkeys(fractions), "path": path, "max_bad_rows": limit}
        data = data.model_copy(update=changes)
    tuning = config.finetune.model_copy(update={"data": data})
    config = config.model_copy(update={"finetune": tuning})
    called = f"--data {path}" if path else ""
    try:
        return prepare(config, tokenizer=tokenizer, measured=called, unlabelled=unlabelled)
    except DataError as error:
        if path is None:
            raise
        message = str(error).replace(f"finetune.data.path {path}", f"--data {path}")
        message = message.replace(
            CHOOSE, "rename one: the columns are those that the run was trained on"
        )
        message = re.sub(r"name it by finetune\.data\.\w+", "rename it", message)
        message = message.replace(
            "more than finetune.data.max_bad_rows", "more than the run's max_bad_rows"
        )
        lacks = [f"no {what} {data.label_column!r}" in message for what in ("column", "field")]
        hint = "; rows without labels are for --predictions FILE" if any(lacks) else ""
        raise DataError(message.replace(", or allow more", "") + hint) from None
