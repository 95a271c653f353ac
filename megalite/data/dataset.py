"""Samples of a mixture of shard folders: each a function of (shards, seed, index), nothing stored.

A source is one stream of tokens, cut into windows of L + 1 that share their last token with the
next window's first. Sample i of the mixture is a sample of one source; that source's samples pass
through its windows in a shuffled order, epoch after epoch, each epoch in another order.

B samples   L sequence_length
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalite.config import DataConfig, RunConfig, SourceConfig
from megalite.data.batch import Arrays, Batch
from megalite.data.corruption import Corruption, Words, make_corruption
from megalite.data.mixture import Mixture
from megalite.data.order import Ints, derive_key, permute
from megalite.errors import DataError
from megalite.files import sha256_file
from megalite.formats.index import OpenFiles
from megalite.formats.shards import CHECKED_AT_OPEN, ShardSet, open_shards
from megalite.tokenizers.tokenizer import load_tokenizer

_ORDER_VERSION = 1  # part of the fingerprint: raise it when a seed comes to mean another order


def open_data(
    config: DataConfig, *, vocab_size: int, verify: bool | None = None
) -> tuple[Dataset, Dataset | None]:
    """Return the results of `open_train` and `open_valid`, and raise the faults of both at once."""
    opened = _open((*config.train, *config.valid), config, vocab_size, verify)
    train = _dataset(opened[: len(config.train)], config.train, config, True)
    if not config.valid:
        return train, None
    return train, _dataset(opened[len(config.train) :], config.valid, config, False)


def open_train(config: DataConfig, *, vocab_size: int, verify: bool | None = None) -> Dataset:
    """Return the training samples of a configuration, shuffled.

    Args:
        vocab_size: the model's, which a source's may not exceed.
        verify: whether to hash each shard before its first use; None: as `config` says.
    Raises:
        DataError: everything that is wrong with any of the sources, a line each.
    """
    return _dataset(_open(config.train, config, vocab_size, verify), config.train, config, True)


def open_valid(
    config: DataConfig, *, vocab_size: int, verify: bool | None = None
) -> Dataset | None:
    """Return the held-out samples of a configuration in their natural order; None if it has none.

    Arguments and errors are those of `open_train`.
    """
    if not config.valid:
        return None
    return _dataset(_open(config.valid, config, vocab_size, verify), config.valid, config, False)


def set_corruption(dataset: Dataset, config: RunConfig) -> None:
    """Set the corruption of the run file's objective, which transforms the windows of a data set.

    Raises:
        DataError: whole words are requested, and the shards do not state their tokenizer.
    """
    words = None
    if config.objective.whole_words:
        if dataset.tokenizer_folder is None:
            raise DataError(
                "objective.whole_words: the shards do not name their tokenizer, whose pieces say "
                "where words begin; tokenize them here, or set it to false"
            )
        words = Words(load_tokenizer(dataset.tokenizer_folder).pieces())
    ends = [(source.manifest.bos, source.manifest.eos) for source in dataset.sources]
    special = frozenset(id for pair in ends for id in pair if id is not None)
    dataset.corruption = make_corruption(config, words, special)


class Dataset:
    """Endless sequence of samples (`Samples`) from shards; any sample can be read at any time.

    Args:
        sources: opened shard folders, each of at least L + 1 tokens.
        weights: shares of samples, of any scale; None for all of them: by their windows.
        sequence_length: L, in tokens.
        seed: of the order.
        mask_documents: whether documents in a window are masked from each other.
        shuffle: False reads each source's windows in their natural order.
    Attributes:
        corruption: the transform of windows (`megalite.data.corruption`). None means none.
    Raises:
        DataError: a source shorter than a window, or weights for some sources only.
    """

    def __init__(
        self,
        sources: Sequence[ShardSet],
        weights: Sequence[float | None],
        *,
        sequence_length: int,
        seed: int,
        mask_documents: bool,
        shuffle: bool = True,
    ) -> None:
        assert len(sources) == len(weights)
        faults = [_too_short(source, sequence_length) for source in sources]
        faults.append(_half_weighted(weights))
        if any(faults):
            raise DataError("\n".join(filter(None, faults)))
        self.sequence_length = sequence_length
        self.sources = list(sources)
        self._windows = np.array([(s.tokens - 1) // sequence_length for s in sources])
        self.num_samples = int(self._windows.sum())  # of one epoch of all sources
        given = [weight for weight in weights if weight is not None]
        self._mixture = Mixture(given or self._windows.tolist())
        self._seed = seed
        self._shuffle = shuffle
        self._mask_documents = mask_documents
        self.corruption: Corruption | None = None
        content = {
            "order": _ORDER_VERSION,
            "sources": [source.fingerprint for source in sources],
            "weights": list(weights),
            "mask_documents": mask_documents,
            "shuffle": shuffle,
        }
        # except windows and order, which the run file specifies
        self.content_fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        content |= {"sequence_length": sequence_length, "seed": seed}
        # Checkpoints keep it: equal fingerprints mean equal samples at every place.
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer, for checkpoints; None if no source states its tokenizer."""
        known = _known_tokenizers(self.sources)
        return known[0].folder / "tokenizer" if known else None

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer's file; empty if no source states its tokenizer."""
        known = _known_tokenizers(self.sources)
        return known[0].manifest.tokenizer.sha256 if known else ""

    def describe(self, samples: int = 0) -> dict[str, Any]:
        """Return windows and tokens of an epoch, and facts about each source.

        A source has its path, windows, tokens that fill no window, share of samples, and epochs
        after `samples` samples.
        """
        length = self.sequence_length
        rows = zip(self.sources, self._windows.tolist(), self._mixture.shares, strict=True)
        return {
            "windows": self.num_samples,
            "tokens": self.num_samples * length,
            "sources": [
                {
                    "path": str(source.path),
                    "windows": windows,
                    "dropped_tokens": source.tokens - 1 - windows * length,
                    "share": share,
                    "epochs": samples * share / windows,
                }
                for source, windows, share in rows
            ],
        }

    def sample(self, index: int) -> Batch:
        """Sample `index` as a batch of one."""
        return self.batch(np.array([index]), index)

    def batch(self, indices: Ints, place: int) -> Batch:
        """Return the samples at `indices`, int64 [B], each in [0, 2^43), as one batch."""
        return self.read(*self.source_of(indices), indices, place)

    def source_of(self, indices: Ints) -> tuple[Ints, Ints]:
        """Return the number of each sample's source, and the first token of its window in the
        source.
        """
        source, number = self._mixture.source_of(indices)
        windows = self._windows[source]
        epoch, window = np.divmod(number, windows)
        if self._shuffle:
            window = permute(window, windows, derive_key(self._seed, source, epoch))
        return source, window * self.sequence_length

    def read(self, sources: Ints, starts: Ints, indices: Ints, place: int) -> Batch:
        """Return the windows that `source_of` found for the samples at `indices`, as tensors.

        Raises:
            DataError: a shard whose read part is damaged.
        """
        shape = B, L = len(starts), self.sequence_length
        input_ids = np.empty(shape, np.int64)
        labels = np.empty(shape, np.int64)
        documents = []
        for row, (number, start) in enumerate(zip(sources.tolist(), starts.tolist(), strict=True)):
            source = self.sources[number]
            window = source.read(start, L + 1)
            input_ids[row] = window[:-1]
            labels[row] = window[1:]
            if self._mask_documents:
                # in one long row of all samples, where column L of a row is column 0 of the next
                documents.append(source.document_starts(start, start + L + 1) + (row * L - start))
        arrays: Arrays = {
            "input_ids": input_ids,
            "labels": labels,
            "loss_mask": np.ones(shape, np.bool_),
        }
        if self._mask_documents:
            firsts = np.concatenate(documents)
            arrays["loss_mask"].reshape(-1)[firsts - 1] = False
            arrays["position_ids"], arrays["document_ids"] = _keep_apart(firsts, B, L)
        if self.corruption is not None:
            arrays = self.corruption(arrays, indices)
        return Batch.of(arrays, place, B * L)

    def sort_by_length(self, indices: Ints) -> Ints:
        """Return the samples unchanged: all have one length."""
        return indices


def _open(
    asked: Sequence[SourceConfig], config: DataConfig, vocab_size: int, verify: bool | None
) -> list[ShardSet]:
    """Open every folder; all that is wrong with any of them is one error."""
    opened: list[ShardSet] = []
    faults: list[str] = []
    files = OpenFiles()
    for source in asked:
        try:
            shards = open_shards(
                Path(source.path),
                verify=config.verify if verify is None else verify,
                vocab_size=vocab_size,
                files=files,
                check_bytes=CHECKED_AT_OPEN // len(asked),
            )
        except DataError as error:
            faults.append(str(error))
            continue
        opened.append(shards)
        faults.append(_too_short(shards, config.sequence_length))
        if shards.vocab_size > vocab_size:
            faults.append(
                f"{shards.path}: its tokenizer has {shards.vocab_size} ids, but model.vocab_size "
                f"is {vocab_size}; raise it for a model yet to be trained, or use shards of this "
                "model's tokenizer"
            )
    faults += _other_tokenizers(opened)
    # checkpoints carry one file; those of the other sources have its hash
    faults += [_other_file(shards) for shards in _known_tokenizers(opened)[:1]]
    if any(faults):
        raise DataError("\n".join(dict.fromkeys(filter(None, faults))))
    return opened


def _known_tokenizers(opened: Sequence[ShardSet]) -> list[ShardSet]:
    """Return the sources that state which tokenizer made them; Megatron's need not."""
    return [shards for shards in opened if shards.manifest.tokenizer.sha256]


def _other_file(shards: ShardSet) -> str:
    """Return a fault if the tokenizer in the folder is not the one that made the ids; else ""."""
    tokenizer = shards.manifest.tokenizer
    path = shards.folder / tokenizer.path
    if not path.is_file():
        return f"{path} is missing: checkpoints carry it; tokenize again, or put it back"
    if sha256_file(path) != tokenizer.sha256:
        return f"{path} was changed since the shards were made (sha256); put the old one back"
    return ""


def _dataset(
    opened: Sequence[ShardSet], asked: Sequence[SourceConfig], config: DataConfig, shuffle: bool
) -> Dataset:
    return Dataset(
        opened,
        [source.weight for source in asked],
        sequence_length=config.sequence_length,
        seed=config.seed,
        mask_documents=config.mask_documents,
        shuffle=shuffle,
    )


def _other_tokenizers(opened: Sequence[ShardSet]) -> list[str]:
    """Return a fault for each source whose ids belong to another tokenizer than the first one's."""
    known = [(s.path, s.manifest.tokenizer.sha256) for s in _known_tokenizers(opened)]
    return [
        f"{path}: tokenized with {sha256[:12]}, but {known[0][0]} with {known[0][1][:12]} "
        "(hashes of the tokenizers' files); tokenize all sources with one tokenizer"
        for path, sha256 in known
        if sha256 != known[0][1]
    ]


def _keep_apart(firsts: Ints, B: int, L: int) -> tuple[Ints, Ints]:
    """Return positions and document numbers, [B, L] each, that restart at `firsts` and in each row.

    Args:
        firsts: int64, places at which documents begin, in one row of B x L tokens.
    """
    rows = np.arange(B + 1) * L
    bounds = np.unique(np.concatenate((rows, firsts)))
    lengths = np.diff(bounds)
    bounds = bounds[:-1]
    positions = np.arange(B * L)
    positions -= np.repeat(bounds, lengths)
    numbers = np.arange(len(bounds)) - np.searchsorted(bounds, rows)[bounds // L]
    return positions.reshape(B, L), np.repeat(numbers, lengths).reshape(B, L)


def _too_short(source: ShardSet, sequence_length: int) -> str:
    if source.tokens > sequence_length:
        return ""
    return (
        f"{source.path}: {source.tokens} tokens are less than one sample of sequence_length "
        f"{sequence_length} and its last target; lower data.sequence_length, or remove it"
    )


def _half_weighted(weights: Sequence[float | None]) -> str:
    missing = sum(weight is None for weight in weights)
    if missing in (0, len(weights)):
        return ""
    return (
        f"{missing} of {len(weights)} sources have no weight; give one to each, or to none "
        "(then each is read in proportion to its size)"
    )
