"""Labelled rows to a folder of tokenized examples (see megalite/formats/examples.py), made once.

The tokens of an example, where BOS and EOS are those that the tokenizer has:

classification      [BOS] text [EOS], the text cut to fit
language_modeling   [BOS] text [EOS], all but BOS learned; cut
seq2seq             [BOS] text [EOS], cut to fit; then target [EOS], cut and learned
sft                 the chat template's rendering, cut; the assistant's turns are learned

BOS is there if the tokenizer begins its texts with it, and for an encoder that classifies. What the
tokenizer's settings put before and after a text takes the place of BOS and EOS.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.cache import cache_arguments, cache_folder, link_learned
from data_prep.chat import TEMPLATE, Chat, find_template
from data_prep.labels import describe_similar, label_name
from data_prep.messages import OPTIONAL_COLUMNS, read_conversation
from data_prep.output import staged
from data_prep.records import Unusable
from data_prep.row import Row
from data_prep.rows import BadRows, Source, columns_of, find_source
from data_prep.split_arrays import Fields, SplitArrays
from data_prep.train import SAMPLE_CHARACTERS, learn_tokenizer, sample_chunks
from megalite import files, hub
from megalite.config import RunConfig
from megalite.errors import DataError, MegaLiteError
from megalite.formats.examples import (
    FORMAT,
    MANIFEST,
    ExamplesManifest,
    SplitInfo,
    edges,
    read_manifest,
    write_split,
)
from megalite.log import logger
from megalite.tokenizers.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "valid", "test")
_BATCH = 512  # rows tokenized at once


def prepare(
    config: RunConfig,
    *,
    tokenizer: str | Path | None,
    chat_template: str | None = None,
    measured: str = "",
    unlabelled: bool = False,
) -> Path:
    """Return the folder of a run's examples, below finetune.data.cache; make it if it is missing.

    Its name is a hash of what decides its content. If several processes make it at the same time,
    one publishes it.

    Args:
        tokenizer: that of the model started from, for where finetune.data.tokenizer is null; where
            both are, one is learned from the training split.
        chat_template: the tokenizer's own, where the caller knows it.
        measured: what messages call the training split where nothing is learned from it.
        unlabelled: whether rows may be without a label.
    Raises:
        DataError: data, a tokenizer or a template that cannot be used; too many bad rows.
    """
    assert config.finetune is not None
    data = config.finetune.data
    source = find_source(data.path, data.train_split)
    name = data.tokenizer or tokenizer
    name = hub.find_tokenizer(name, "finetune.data.tokenizer") or name if name else None
    encoder = load_tokenizer(name) if name is not None else None
    template = None
    if config.finetune.task == "sft":
        template = find_template(data.chat_template, chat_template, name)
    arguments = cache_arguments(config, source, encoder, template, unlabelled=unlabelled)
    folder = cache_folder(data.cache, arguments)
    if not (folder.is_dir() and any(folder.iterdir())):
        try:
            with staged(folder) as staging:
                maker = _Maker(config, source, encoder, template, measured, unlabelled)
                maker.make(staging, arguments)
        except MegaLiteError:
            if not (folder / MANIFEST).is_file():  # else another process was faster
                raise
    read_manifest(folder)
    if encoder is None:
        link_learned(data.cache, arguments, folder, load_tokenizer(folder / "tokenizer"))
    return folder


class _Maker:
    """Maker of one folder; each pass over a split reads its rows again."""

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        encoder: Tokenizer | None,
        template: str | None,
        measured: str,
        unlabelled: bool,
    ) -> None:
        assert config.finetune is not None
        self._config, self._source, self._template = config, source, template
        self._task, self._data = config.finetune.task, config.finetune.data
        self._called = {split: split for split in SPLITS} | {"train": measured or "train"}
        self._columns, self._optional = columns_of(config.finetune), list[str]()
        if unlabelled:
            self._columns.remove(self._data.label_column)
            self._optional = [self._data.label_column]
        if self._task == "sft":
            self._optional = [name for name in OPTIONAL_COLUMNS if name not in self._columns]
        self._bad = {split: BadRows(self._data.max_bad_rows) for split in SPLITS}
        self._kept = self._cut_fractions()
        self._names: tuple[str, ...] | None = None
        if self._task == "classification":
            self._names = source.label_names(self._data.train_split, self._data.label_column)
        self._labels: dict[str, int] = {}  # the place of each, once they are chosen
        self._labels = self._choose_labels()
        self._tokenizer = encoder or self._learn_tokenizer()
        self._chat = Chat(template, self._tokenizer) if template is not None else None
        leads = self._task == "classification" and config.model.architecture == "encoder"
        self._before, self._after = edges(self._tokenizer, leads=leads)
        eos = self._tokenizer.eos_id
        self._ended = self._after if eos is None else [eos]  # a target ends for itself
        if self._data.max_length <= len(self._before) + len(self._after):
            raise DataError(
                f"finetune.data.max_length {self._data.max_length}: BOS and EOS leave no token of "
                "a text; ask for more"
            )

    def make(self, folder: Path, arguments: dict[str, Any]) -> None:
        place = folder / "tokenizer"
        place.mkdir()
        self._tokenizer.save(place)
        if self._template is not None:
            (place / TEMPLATE).write_text(self._template, encoding="utf-8")
        for file in place.iterdir():
            files.sync_file(file)
        splits = [split for split in SPLITS if self._origin(split)]
        manifest = ExamplesManifest(
            format=FORMAT,
            task=self._task,
            labels=tuple(self._labels),
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            splits={split: self._split(folder, split) for split in splits},
            arguments=arguments,
        )
        files.write_json(folder / MANIFEST, manifest.model_dump(mode="json"))

    def _split(self, folder: Path, split: str) -> SplitInfo:
        made = self._tokenized(split)
        total, bad, called = len(made.rows), len(self._bad[split]), self._called[split]
        if not total:
            raise self._empty(split)
        if made.cut:
            logger.warning(
                "%s: %s of %s examples (%.1f %%) were longer than finetune.data.max_length %d "
                "allows, and are cut",
                *(called, f"{made.cut:,}", f"{total:,}", 100 * made.cut / total),
                self._data.max_length,
            )
        arrays = {"tokens": made.tokens, "bounds": made.bounds, "rows": made.rows}
        counts: dict[str, int] = {}
        if self._task == "classification":
            arrays["labels"] = made.labels
            every = np.asarray(made.labels, np.int64)
            known = every[every >= 0]
            found = np.bincount(known, minlength=len(self._labels))
            counts = dict(zip(self._labels, found.tolist(), strict=True))
            none = [label for label, count in counts.items() if not count]
            if called == "train":
                listed = [f"{label} {count:,}" for label, count in list(counts.items())[:20]]
                logger.info("train: %d labels: %s", len(counts), ", ".join(listed))
            if none and len(known) == total:
                logger.warning(
                    "%s: no example of %s; macro averages count them as 0", called, ", ".join(none)
                )
            if split == "train" and self._data.labels is None and np.count_nonzero(found) < 2:
                alone = list(self._labels)[int(found.argmax())]
                raise DataError(
                    f"finetune.data.label_column {self._data.label_column!r}: all rows of the "
                    f"training split are {alone!r}; a classification needs two labels or more"
                )
        told = {kind: np.asarray(values) for kind, values in arrays.items()}
        if self._task != "classification":
            told["learned"] = np.frombuffer(made.learned, np.uint8)
        return write_split(folder, split, told, cut=made.cut, bad_rows=bad, counts=counts)

    def _empty(self, split: str) -> DataError:
        called = self._called[split]
        where = f"finetune.data.path {self._data.path}: the {split} split"
        return DataError(
            f"{called if called != split else where} has no example ({len(self._bad[split])} bad "
            "rows); give rows that can be used"
        )

    # ---- rows

    def _origin(self, split: str) -> str | None:
        """The split of the source that a split is read from."""
        if split in self._kept:
            return self._data.train_split
        found: str | None = getattr(self._data, f"{split}_split")
        return found

    def _cut_fractions(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Return which rows of the training split each split has; {} if no split is cut off."""
        data = self._data
        shares = {"test": data.test_fraction, "valid": data.valid_fraction}
        if not any(shares.values()):
            return {}
        rows = sum(1 for _ in self._source.rows(data.train_split, self._columns))
        if not rows:
            raise self._empty("train")
        order = np.random.Generator(np.random.PCG64(self._config.data.seed)).permutation(rows)
        kept, start = {}, 0
        for split, share in (*shares.items(), ("train", 1.0)):
            if not share:
                continue
            count = rows - start if split == "train" else round(share * rows)
            if count < 1:
                key = f"{split}_fraction {share}" if split != "train" else "fractions"
                raise DataError(
                    f"finetune.data.{key}: of the {rows} rows of {data.train_split!r} none is left "
                    f"for {split}; choose other shares"
                )
            kept[split] = np.zeros(rows, np.bool_)
            kept[split][order[start : start + count]] = True
            start += count
        return kept

    def _rows(self, split: str) -> Iterator[Fields]:
        """The rows that can be used; the others are counted."""
        origin, kept = self._origin(split), self._kept.get(split)
        assert origin is not None
        for row in self._source.rows(origin, self._columns, self._optional):
            if kept is None or kept[row.number]:
                try:
                    fields = self._fields(row)
                except Unusable as error:
                    self._bad[split].add(row, str(error))
                    continue
                yield fields
        self._bad[split].check()

    def _fields(self, row: Row) -> Fields:
        data = self._data
        if self._task == "classification":
            text = row.text(data.text_column)
            if self._optional and self._lacks(row.values.get(data.label_column)):
                return Fields(row, (text,))
            label = row.get(data.label_column)
            if not isinstance(label, str) or label not in self._labels:
                label = label_name(label, data.label_column, self._names)
            if self._labels and label not in self._labels:
                known = ", ".join(map(repr, self._labels))
                raise Unusable(
                    f"label {label!r} is none of {known}, the labels of the training rows"
                )
            return Fields(row, (text,), label)
        if self._task == "sft":
            messages, tools = read_conversation(row, self._columns)
            return Fields(row, (), messages=messages, tools=tools)
        return Fields(row, tuple(row.text(column) for column in self._columns))

    def _lacks(self, label: Any) -> bool:
        """Return whether a value means no label: null, blank, NaN, or the hub's -1."""
        empty = label is None or label != label or (isinstance(label, str) and not label.strip())
        return empty or (str(label) == "-1" and "-1" not in self._labels)

    # ---- what is learned from the training split before it is tokenized

    def _choose_labels(self) -> dict[str, int]:
        if self._task != "classification":
            return {}
        labels = self._data.labels or self._names
        if labels is None:
            found = Counter(fields.label for fields in self._rows("train"))
            for similar in describe_similar(found):
                logger.warning(
                    "finetune.data.label_column %r: these are different labels: %s (rows of each); "
                    "if they mean the same, write them in one way",
                    *(self._data.label_column, similar),
                )
            numbers = all(re.fullmatch(r"-?\d+", label) for label in found)
            labels = tuple(sorted(found, key=lambda x: (int(x), x) if numbers else (0, x)))
        if len(set(labels)) != len(labels):
            raise DataError(f"finetune.data.labels {', '.join(labels)}: one is there twice")
        return {label: place for place, label in enumerate(labels)}

    def _learn_tokenizer(self) -> Tokenizer:
        texts = (
            text
            for fields in self._rows("train")
            for text in (*fields.texts, *(m.get("content", "") for m in fields.messages))
        )
        sample = sample_chunks(texts, SAMPLE_CHARACTERS)
        if not sample:
            raise self._empty("train")
        size = self._config.model.vocab_size
        return learn_tokenizer(sample, size, option="model.vocab_size", fewer=True)

    # ---- rows to tokens

    def _tokenized(self, split: str) -> SplitArrays:
        made, rows, threads = SplitArrays(), self._rows(split), os.cpu_count() or 1
        while batch := list(islice(rows, _BATCH)):
            texts = [text for fields in batch for text in fields.texts]
            ids = iter(self._tokenizer.encode_batch(texts, threads=threads))
            for fields in batch:
                found = [next(ids).tolist() for _ in fields.texts]
                try:
                    example = self._example(fields, found)
                except Unusable as error:
                    self._bad[split].add(fields.row, str(error))
                    continue
                except DataError as error:
                    raise DataError(f"{fields.row.place}: {error}") from None
                made.add(fields.row.number, *example)
                made.labels.append(self._labels.get(fields.label, -1))
        if self._chat is not None:
            self._chat.report(self._called[split])
        self._bad[split].check()
        return made

    def _example(self, fields: Fields, found: list[list[int]]) -> tuple[list[int], Any, bool]:
        """Ids, which of them are learned, and whether any were cut off."""
        most, before, after = self._data.max_length, self._before, self._after
        if self._chat is not None:
            ids, learned = self._chat.encode(fields.messages, fields.tools)
            if not any(learned):
                raise Unusable(
                    "nothing of it is learned: the chat template leaves the assistant's turns out, "
                    "or each of them has weight 0"
                )
            if not any(learned[:most]):
                raise Unusable(f"none of the assistant's tokens is among the first {most}")
            return ids[:most], learned[:most], len(ids) > most
        if not all(found):
            raise Unusable("the tokenizer makes no token of its text")
        if self._task == "language_modeling":
            ids = before + found[0] + after
            learned = [number >= len(before) for number in range(min(len(ids), most))]
            return ids[:most], learned, len(ids) > most
        room = most - len(before) - len(after)
        source, target = before + found[0][:room] + after, found[-1] + self._ended
        cut, limit = len(found[0]) > room, self._data.max_target_length
        if self._task == "classification":
            return source, (), cut
        learned = [False] * len(source) + [True] * min(len(target), limit)
        return source + target[:limit], learned, cut or len(target) > limit
