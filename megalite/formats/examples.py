"""Tokenized examples for fine-tuning: a folder that contains each split as NumPy files.

manifest.json        hashes of the other files, and counts
tokenizer/           the tokenizer's files
SPLIT.tokens.npy     int32 [tokens]: the ids of all examples, concatenated
SPLIT.bounds.npy     int64 [examples + 1]: the first token of each example, and the end
SPLIT.rows.npy       int64 [examples]: the example's row in the source, from 0
SPLIT.labels.npy     int64 [examples]: the index of the example's label (classification only)
SPLIT.learned.npy    uint8 [tokens]: 1 if a token is a target (all other tasks)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from megalite import files
from megalite.errors import DataError
from megalite.tokenizers.tokenizer import Tokenizer

MANIFEST = "manifest.json"
FORMAT = "megalite-examples-2"
_DTYPES = {"tokens": "<i4", "bounds": "<i8", "rows": "<i8", "learned": "|u1", "labels": "<i8"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SplitInfo(_Frozen):
    """Counts and hashes of a split.

    Attributes:
        cut: number of examples that were truncated to the window.
        bad_rows: number of rows that were skipped.
        counts: number of examples of each label.
        sha256: the hash of each array's file, by the array's name.
    """

    examples: int
    tokens: int
    cut: int
    bad_rows: int
    counts: dict[str, int]
    sha256: dict[str, str]


class ExamplesManifest(_Frozen):
    """The content of `manifest.json`; `tokenizer_sha256` is the hash of the saved tokenizer."""

    format: str
    task: str
    labels: tuple[str, ...]
    tokenizer_sha256: str
    vocab_size: int
    splits: dict[str, SplitInfo]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ExampleSplit:
    """The examples of a split, in memory-mapped arrays."""

    name: str
    info: SplitInfo
    tokens: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    loss_masks: npt.NDArray[np.uint8] | None
    labels: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each example."""
        return np.diff(self.bounds)

    def ids(self, example: int) -> npt.NDArray[np.int32]:
        """Return the tokens of an example."""
        return self.tokens[self.bounds[example] : self.bounds[example + 1]]

    def loss_mask(self, example: int) -> npt.NDArray[np.bool_]:
        """Return which tokens of an example are targets of the loss."""
        assert self.loss_masks is not None
        return self.loss_masks[self.bounds[example] : self.bounds[example + 1]].astype(np.bool_)


def prefix_and_suffix_ids(tokenizer: Tokenizer, *, add_bos: bool) -> tuple[list[int], list[int]]:
    """Return the ids before and after a text: the tokenizer's prefix, and its suffix or else EOS.

    Args:
        add_bos: if true, BOS is the default prefix.
    """
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    before, after = list(tokenizer.prefix_ids), list(tokenizer.suffix_ids)
    if add_bos and not before and bos is not None:
        before = [bos]
    return before, after or ([] if eos is None else [eos])


def write_split(
    folder: Path, name: str, arrays: Mapping[str, npt.NDArray[Any]], **counts: Any
) -> SplitInfo:
    """Write a split's arrays, by the names above, and return the split's entry in the manifest.

    Args:
        counts: `cut`, `bad_rows` and `counts` of the split.
    """
    hashes = {}
    for kind, array in arrays.items():
        path = folder / f"{name}.{kind}.npy"
        np.save(path, np.asarray(array, _DTYPES[kind]), allow_pickle=False)
        files.sync_file(path)
        hashes[kind] = files.sha256_file(path)
    sizes = {"examples": len(arrays["rows"]), "tokens": len(arrays["tokens"])}
    return SplitInfo.model_validate({**sizes, "sha256": hashes, **counts})


def read_examples_manifest(folder: Path) -> ExamplesManifest:
    """Read and check the manifest of a folder of examples.

    Raises:
        DataError: it is missing, invalid, or of another version.
    """
    try:
        manifest = ExamplesManifest.model_validate(files.read_json(folder / MANIFEST))
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{folder} has no readable tokenized examples: {reason}; delete the folder, and it is "
            "made again"
        ) from None
    if manifest.format != FORMAT:
        raise DataError(f"{folder} has another version's format ({manifest.format}); delete it")
    return manifest


def open_split(folder: Path, manifest: ExamplesManifest, name: str) -> ExampleSplit:
    """Compare a split's files with their hashes and map them.

    Raises:
        DataError: there is no such split, or one of its files is missing or was changed.
    """
    info = manifest.splits.get(name)
    if info is None:
        raise DataError(f"{folder}: no split {name!r}; it has {', '.join(manifest.splits)}")
    needed = {"tokens", "bounds", "rows"}
    if not needed <= {*info.sha256} <= {*_DTYPES} or not files.is_plain_name(name):
        raise DataError(
            f"{folder}/{MANIFEST}: split {name!r} has {', '.join(info.sha256) or 'no arrays'}, not "
            f"the arrays of a split; delete {folder}: it is made again"
        )
    arrays: dict[str, Any] = dict.fromkeys(_DTYPES)
    for kind, sha256 in info.sha256.items():
        path = folder / f"{name}.{kind}.npy"
        if not path.is_file() or files.sha256_file(path) != sha256:
            raise DataError(f"{path} is missing or was changed; delete {folder}: it is made again")
        mode: Any = "r" if info.tokens else None
        try:
            arrays[kind] = np.load(path, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}; delete {folder}") from None
    return ExampleSplit(name, info, loss_masks=arrays.pop("learned"), **arrays)


def examples_fingerprint(manifest: ExamplesManifest) -> str:
    """Return a SHA-256 of the task, its labels and the arrays of all splits."""
    content = manifest.model_dump(mode="json", include={"task", "labels", "splits"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
