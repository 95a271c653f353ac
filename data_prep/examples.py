"""Folders of tokenized examples from rows (see megalite/formats/examples.py), in a cache.

`data_prep/tasks` defines the tokens of an example for each task. BOS and EOS are the tokenizer's;
its prefix and suffix replace them if it has any.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cache import cache_arguments, cache_folder, link_by_tokenizer
from data_prep.chat import TEMPLATE, find_template
from data_prep.output import staged
from data_prep.records import Unusable
from data_prep.row_splits import RowSplits
from data_prep.rows import Source, find_source
from data_prep.split_arrays import SplitArrays
from data_prep.tasks import TaskContext, task_class
from data_prep.train import SAMPLE_CHARACTERS, sample_chunks, train_sentencepiece
from megalite import files, hub
from megalite.config import RunConfig
from megalite.config.tasks import find_task
from megalite.errors import DataError, MegaLiteError
from megalite.formats.examples import (
    FORMAT,
    MANIFEST,
    ExamplesManifest,
    SplitInfo,
    read_examples_manifest,
    write_split,
)
from megalite.log import logger
from megalite.tokenizers.tokenizer import Tokenizer, load_tokenizer

_BATCH = 512  # rows tokenized at once


def prepare(
    config: RunConfig,
    *,
    tokenizer: str | Path | None,
    chat_template: str | None = None,
    measured: str = "",
    unlabelled: bool = False,
) -> Path:
    """Return the folder of a run's examples in finetune.data.cache. Make the folder if necessary.

    The folder's name is a hash of everything that decides its content. If several processes make
    it at the same time, one publishes it.

    Args:
        tokenizer: the tokenizer of the start model, used if finetune.data.tokenizer is null. If
            both are null, a tokenizer is trained on the training split.
        chat_template: the text of the tokenizer's template, if the caller has it.
        measured: name of the training split in messages if it is only evaluated; else "".
        unlabelled: whether rows may lack a label.
    Raises:
        DataError: the data, the tokenizer or the template cannot be used, or too many rows are bad.
    """
    assert config.finetune is not None
    data = config.finetune.data
    source = find_source(data.path, data.train_split)
    name = data.tokenizer or tokenizer
    name = hub.find_tokenizer(name, "finetune.data.tokenizer") or name if name else None
    encoder = load_tokenizer(name) if name is not None else None
    template = None
    if find_task(config.finetune.task).uses_template:
        template = find_template(data.chat_template, chat_template, name)
    arguments = cache_arguments(config, source, encoder, template, unlabelled=unlabelled)
    folder = cache_folder(data.cache, arguments)
    if not (folder.is_dir() and any(folder.iterdir())):
        try:
            with staged(folder) as staging:
                maker = ExampleMaker(
                    config,
                    source,
                    tokenizer=encoder,
                    template=template,
                    measured=measured,
                    unlabelled=unlabelled,
                )
                maker.make(staging, arguments)
        except MegaLiteError:
            if not (folder / MANIFEST).is_file():  # no other process was faster
                raise
    read_examples_manifest(folder)
    if encoder is None:
        link_by_tokenizer(data.cache, arguments, folder, load_tokenizer(folder / "tokenizer"))
    return folder


class ExampleMaker:
    """Maker of one folder of examples.

    Args:
        tokenizer: None means to train one on the training split.
        measured: as in `prepare`.
        unlabelled: whether rows may lack a label.
    Raises:
        DataError: the rows, the labels or the length cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        *,
        tokenizer: Tokenizer | None,
        template: str | None,
        measured: str = "",
        unlabelled: bool = False,
    ) -> None:
        assert config.finetune is not None
        self._config = config
        self._data = config.finetune.data
        self._template = template
        kind = task_class(config.finetune.task)
        names = None
        if find_task(config.finetune.task).has_labels:
            names = source.label_names(self._data.train_split, self._data.label_column)
        self._task = kind(
            TaskContext(
                data=self._data,
                architecture=config.model.architecture,
                template=template,
                label_names=names,
                unlabelled=unlabelled,
            )
        )
        self._splits = RowSplits(
            source, self._task, self._data, seed=config.data.seed, measured=measured
        )
        self._task.choose_labels(lambda: self._splits.rows("train"))
        self._tokenizer = tokenizer or self._train_tokenizer()
        self._task.set_tokenizer(self._tokenizer)

    def make(self, folder: Path, arguments: dict[str, Any]) -> None:
        """Write the tokenizer, all splits and the manifest to an existing folder.

        Args:
            arguments: everything that decides the content, for the manifest.
        """
        assert self._config.finetune is not None
        self._save_tokenizer(folder / "tokenizer")
        manifest = ExamplesManifest(
            format=FORMAT,
            task=self._config.finetune.task,
            labels=tuple(self._task.labels),
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            splits={split: self._write(folder, split) for split in self._splits.names()},
            arguments=arguments,
        )
        files.write_json(folder / MANIFEST, manifest.model_dump(mode="json"))

    def _save_tokenizer(self, folder: Path) -> None:
        folder.mkdir()
        self._tokenizer.save(folder)
        if self._template is not None:
            (folder / TEMPLATE).write_text(self._template, encoding="utf-8")
        for file in folder.iterdir():
            files.sync_file(file)

    def _write(self, folder: Path, split: str) -> SplitInfo:
        data = self._tokenized(split)
        total = len(data.rows)
        title = self._splits.titles[split]
        if not total:
            raise self._splits.empty_fault(split)
        if data.cut:
            share = f"{data.cut:,} of {total:,} examples ({100 * data.cut / total:.1f} %)"
            logger.warning(
                "%s: %s were longer than finetune.data.max_length %d allows, and are cut",
                title,
                share,
                self._data.max_length,
            )
        arrays = {"tokens": data.tokens, "bounds": data.bounds, "rows": data.rows}
        return write_split(
            folder,
            split,
            {kind: np.asarray(values) for kind, values in arrays.items()}
            | self._task.split_arrays(data, title, split),
            cut=data.cut,
            bad_rows=len(self._splits.bad[split]),
            counts=self._task.label_counts(data),
        )

    def _train_tokenizer(self) -> Tokenizer:
        texts = (
            text
            for fields in self._splits.rows("train")
            for text in (*fields.texts, *(m.get("content", "") for m in fields.messages))
        )
        sample = sample_chunks(texts, SAMPLE_CHARACTERS)
        if not sample:
            raise self._splits.empty_fault("train")
        size = self._config.model.vocab_size
        return train_sentencepiece(sample, size, option="model.vocab_size", allow_fewer=True)

    def _tokenized(self, split: str) -> SplitArrays:
        arrays = SplitArrays()
        rows = self._splits.rows(split)
        threads = os.cpu_count() or 1
        bad = self._splits.bad[split]
        while batch := list(islice(rows, _BATCH)):
            texts = [text for fields in batch for text in fields.texts]
            ids = iter(self._tokenizer.encode_batch(texts, threads=threads))
            for fields in batch:
                encoded = [next(ids).tolist() for _ in fields.texts]
                try:
                    example = self._task.encode(fields, encoded)
                except Unusable as error:
                    bad.add(fields.row, str(error))
                    continue
                except DataError as error:
                    raise DataError(f"{fields.row.place}: {error}") from None
                arrays.add(fields.row.number, example, self._task.labels.get(fields.label, -1))
        self._task.report(self._splits.titles[split])
        bad.check()
        return arrays
