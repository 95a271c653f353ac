"""Examples for the evaluation of a fine-tuned model, or for predictions."""

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
    """Return the examples to evaluate a fine-tuned model on, and their split; a collective.

    Args:
        path: a file of other rows. None means the run's data: its test split, else the validation
            split, else the training split.
        first: whether this rank makes the examples.
        gather: function that returns the values of all ranks on every rank.
        predictions: the file for predictions. If given, rows of `path` may lack a label, and
            unusable rows are skipped.
    Raises:
        UserError: the data cannot be used; raised on every rank.
    """
    result: tuple[Path | None, MegaLiteError | None] = (None, None)
    if first:
        try:
            result = _prepare(config, tokenizer, path, predictions), None
        except MegaLiteError as error:
            result = None, error
    folder, fault = gather(result)[0]
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
                f"--data {path}: these are shards, but a fine-tuned model is evaluated on rows, "
                f"such as {data.path}: give a file of rows, or remove it"
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
