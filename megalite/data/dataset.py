"""Samples of a mixture of shard folders, each computed from the shards, the seed and its number.

A source is a stream of tokens. It is divided into windows of L + 1 tokens, of which the last is
also the first of the next window. Every sample of the mixture is a window of one source. A source's
windows are read in epochs, each shuffled differently.

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
from megalite.data.corruption import Corruption, WordBoundaries, make_corruption
from megalite.data.mixture import Mixture
from megalite.data.order import Ints, derive_key, permute
from megalite.errors import DataError
from megalite.files import sha256_file
from megalite.formats.index import OpenFiles
from megalite.formats.shards import CHECKED_AT_OPEN, ShardSet, open_shards
from megalite.tokenizers.tokenizer import load_tokenizer

_ORDER_VERSION = 1  # enters the fingerprint; raise it if the order for a seed changes


def open_data(
    config: DataConfig, *, vocab_size: int, verify: bool | None = None
) -> tuple[Dataset, Dataset | None]:
    """Return the results of `open_train` and `open_valid`. An error has the faults of both."""
    opened = _open((*config.train, *config.valid), config, vocab_size, verify)
    train = _dataset(opened[: len(config.train)], config.train, config, True)
    if not config.valid:
        return train, None
    return train, _dataset(opened[len(config.train) :], config.valid, config, False)


def open_train(config: DataConfig, *, vocab_size: int, verify: bool | None = None) -> Dataset:
    """Return the training samples of a configuration, shuffled.

    Args:
        vocab_size: the model's vocabulary size, which no source may exceed.
        verify: whether to hash each shard before its first use. None means `config.verify`.
    Raises:
        DataError: a source is missing, damaged or unsuitable. The message lists all faults.
    """
    return _dataset(_open(config.train, config, vocab_size, verify), config.train, config, True)


def open_valid(
    config: DataConfig, *, vocab_size: int, verify: bool | None = None
) -> Dataset | None:
    """Return the held-out samples of a configuration in order, or None if it has none.

    Arguments and errors are those of `open_train`.
    """
    if not config.valid:
        return None
    return _dataset(_open(config.valid, config, vocab_size, verify), config.valid, config, False)


def set_corruption(dataset: Dataset, config: RunConfig) -> None:
    """Set the corruption of a data set's windows by the run file's objective.

    Raises:
        DataError: `objective.whole_words` is set, but the shards do not name their tokenizer.
    """
    words = None
    if config.objective.whole_words:
        if dataset.tokenizer_folder is None:
            raise DataError(
                "objective.whole_words: the shards do not name their tokenizer, whose pieces show "
                "the beginnings of words; tokenize them with data_prep, or set it to false"
            )
        words = WordBoundaries(load_tokenizer(dataset.tokenizer_folder).pieces())
    ends = [(source.manifest.bos, source.manifest.eos) for source in dataset.sources]
    special = frozenset(id for pair in ends for id in pair if id is not None)
    dataset.corruption = make_corruption(config, words, special)


class Dataset:
    """Endless sequence of samples (`Samples`) from shards, with random access.

    Args:
        sources: open shard folders of at least L + 1 tokens each.
        weights: relative shares of samples. None for all sources means their numbers of windows.
        sequence_length: L, in tokens.
        seed: seed of the order.
        mask_documents: whether documents in a window are masked from each other.
        shuffle: If false, read each source's windows in order.
    Attributes:
        corruption: transform of the windows (`megalite.data.corruption`). None means none.
    Raises:
        DataError: a source is shorter than a window, or only some sources have weights.
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
        faults.append(_some_without_weight(weights))
        if any(faults):
            raise DataError("\n".join(filter(None, faults)))
        self.sequence_length = sequence_length
        self.sources = list(sources)
        self._windows = np.array([(s.tokens - 1) // sequence_length for s in sources])
        self.num_samples = int(self._windows.sum())  # of one epoch of all sources
        explicit = [weight for weight in weights if weight is not None]
        self._mixture = Mixture(explicit or self._windows.tolist())
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
        # The content without length and seed, which the run file defines.
        self.content_fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        content |= {"sequence_length": sequence_length, "seed": seed}
        # Equal fingerprints mean equal samples in equal order. Checkpoints record it.
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def tokenizer_folder(self) -> Path | None:
        """The tokenizer's folder, which checkpoints copy; None if no source names a tokenizer."""
        sources = _with_tokenizer(self.sources)
        return sources[0].folder / "tokenizer" if sources else None

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer's file; empty if no source names a tokenizer."""
        sources = _with_tokenizer(self.sources)
        return sources[0].manifest.tokenizer.sha256 if sources else ""

    def describe(self, samples: int = 0) -> dict[str, Any]:
        """Return the windows and tokens of an epoch, and numbers for each source.

        These are its windows, the tokens in no window, its share of samples, and its epochs after
        `samples` samples.
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
        """Return sample `index` as a batch of one."""
        return self.batch(np.array([index]), index)

    def batch(self, indices: Ints, place: int) -> Batch:
        """Return the samples at `indices`, int64 [B], each in [0, 2^43), as one batch."""
        return self.read(*self.source_of(indices), indices, place)

    def source_of(self, indices: Ints) -> tuple[Ints, Ints]:
        """Return each sample's source, and its window's first token in the source."""
        source, number = self._mixture.source_of(indices)
        windows = self._windows[source]
        epoch, window = np.divmod(number, windows)
        if self._shuffle:
            window = permute(window, windows, derive_key(self._seed, source, epoch))
        return source, window * self.sequence_length

    def read(self, sources: Ints, starts: Ints, indices: Ints, place: int) -> Batch:
        """Return the windows that `source_of` returned for `indices` as a batch.

        Raises:
            DataError: the part of a shard that is read is damaged.
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
                # Positions in the batch's concatenated rows; column L is column 0 of the next row.
                documents.append(source.document_starts(start, start + L + 1) + (row * L - start))
        arrays: Arrays = {
            "input_ids": input_ids,
            "labels": labels,
            "loss_mask": np.ones(shape, np.bool_),
        }
        if self._mask_documents:
            firsts = np.concatenate(documents)
            arrays["loss_mask"].reshape(-1)[firsts - 1] = False
            arrays["position_ids"], arrays["document_ids"] = _position_and_document_ids(
                firsts, B, L
            )
        if self.corruption is not None:
            arrays = self.corruption(arrays, indices)
        return Batch.of(arrays, place, B * L)

    def sort_by_length(self, indices: Ints) -> Ints:
        """Return the samples unchanged, because all have the same length."""
        return indices


def _open(
    sources: Sequence[SourceConfig], config: DataConfig, vocab_size: int, verify: bool | None
) -> list[ShardSet]:
    """Open all sources, or raise one error with the faults of all."""
    opened: list[ShardSet] = []
    faults: list[str] = []
    files = OpenFiles()
    for source in sources:
        try:
            shards = open_shards(
                Path(source.path),
                verify=config.verify if verify is None else verify,
                vocab_size=vocab_size,
                files=files,
                check_bytes=CHECKED_AT_OPEN // len(sources),
            )
        except DataError as error:
            faults.append(str(error))
            continue
        opened.append(shards)
        faults.append(_too_short(shards, config.sequence_length))
        if shards.vocab_size > vocab_size:
            faults.append(
                f"{shards.path}: its tokenizer has {shards.vocab_size} ids, but model.vocab_size "
                f"is {vocab_size}; raise model.vocab_size for a new model, or tokenize the text "
                "with the model's tokenizer"
            )
    faults += _other_tokenizers(opened)
    # Checkpoints copy the first source's file. The other sources have the same hash.
    faults += [_tokenizer_file_fault(shards) for shards in _with_tokenizer(opened)[:1]]
    if any(faults):
        raise DataError("\n".join(dict.fromkeys(filter(None, faults))))
    return opened


def _with_tokenizer(opened: Sequence[ShardSet]) -> list[ShardSet]:
    """Return the sources that name their tokenizer. Megatron's shards need not."""
    return [shards for shards in opened if shards.manifest.tokenizer.sha256]


def _tokenizer_file_fault(shards: ShardSet) -> str:
    """Return a fault if the tokenizer's file is missing or was changed, else ""."""
    tokenizer = shards.manifest.tokenizer
    path = shards.folder / tokenizer.path
    if not path.is_file():
        return f"{path} is missing, but checkpoints need it; put it back, or tokenize again"
    if sha256_file(path) != tokenizer.sha256:
        return f"{path} was changed since the shards were made (sha256); put the old file back"
    return ""


def _dataset(
    opened: Sequence[ShardSet], sources: Sequence[SourceConfig], config: DataConfig, shuffle: bool
) -> Dataset:
    return Dataset(
        opened,
        [source.weight for source in sources],
        sequence_length=config.sequence_length,
        seed=config.seed,
        mask_documents=config.mask_documents,
        shuffle=shuffle,
    )


def _other_tokenizers(opened: Sequence[ShardSet]) -> list[str]:
    """Return a fault for each source whose tokenizer is not the first one's."""
    hashes = [(s.path, s.manifest.tokenizer.sha256) for s in _with_tokenizer(opened)]
    return [
        f"{path}: tokenized with {sha256[:12]}, but {hashes[0][0]} with {hashes[0][1][:12]} "
        "(hashes of the tokenizers' files); tokenize all sources with one tokenizer"
        for path, sha256 in hashes
        if sha256 != hashes[0][1]
    ]


def _position_and_document_ids(firsts: Ints, B: int, L: int) -> tuple[Ints, Ints]:
    """Return position ids and document ids, [B, L] each, for documents that begin at `firsts`.

    Args:
        firsts: int64, first tokens of documents in the B x L tokens of the concatenated rows.
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


def _some_without_weight(weights: Sequence[float | None]) -> str:
    missing = sum(weight is None for weight in weights)
    if missing in (0, len(weights)):
        return ""
    return (
        f"{missing} of {len(weights)} sources have no weight; set a weight for each, or for none "
        "(to read each in proportion to its size)"
    )
