"""A quick check of the first rows for a fine-tuning run, without tokenizing."""

from __future__ import annotations

from data_prep.records import Unusable
from data_prep.row_files import CHOOSE
from data_prep.rows import find_source
from data_prep.tasks import task_class
from megalite.config import RunConfig
from megalite.errors import DataError
from megalite.tokenizers.tokenizer import load_tokenizer


def preview(config: RunConfig) -> str:
    """Check the first row of each split, and the tokenizer's vocabulary size.

    Returns:
        a line with the data's path, its splits and the task's columns.
    Raises:
        DataError: the data or a column is missing, or the tokenizer has more ids than the model.
    """
    assert config.finetune is not None
    data = config.finetune.data
    columns = task_class(config.finetune.task).columns_of(config.finetune.data)
    source = find_source(data.path, data.train_split)
    splits = [split for split in (data.train_split, data.valid_split, data.test_split) if split]
    for split in splits:
        first = next(source.rows(split, columns), None)
        if first is None:
            raise DataError(f"finetune.data.path {data.path}: the {split} split has no row")
        try:
            for column in columns:
                first.get(column)
        except Unusable as error:
            if data.max_bad_rows == 0:
                raise DataError(f"{first.place}: {error}; {CHOOSE}") from None
    if data.tokenizer is not None:
        size = load_tokenizer(data.tokenizer).vocab_size
        most = config.model.vocab_size
        if size > most:
            raise DataError(
                f"model.vocab_size: {most}, but the tokenizer has {size} ids; set model.vocab_size "
                f"to {size}"
            )
    return f"{data.path}: {', '.join(splits)} with {', '.join(columns)}"
