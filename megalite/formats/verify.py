"""Checks of a shard folder against its manifest: quick ones to open it, and a full verification."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megalite.errors import DataError
from megalite.files import sha256_file
from megalite.formats.index import Index, read_header, read_index
from megalite.formats.manifest import (
    MANIFEST_NAME,
    UNKNOWN_TOKENIZER,
    ShardInfo,
    ShardManifest,
    TokenizerInfo,
    load_manifest,
)
from megalite.log import logger
from megalite.tokenizers.tokenizer import load_tokenizer

_CHUNK = 8 << 20  # bytes, a multiple of every item's size
_OUR_SHARD = re.compile(r"shard_\d{5,}")


def bin_path(folder: Path, shard: str) -> Path:
    """Return the file of a shard's token ids."""
    return folder / f"{shard}.bin"


def idx_path(folder: Path, shard: str) -> Path:
    """Return the file of a shard's document boundaries."""
    return folder / f"{shard}.idx"


def verify_folder(folder: Path | str) -> list[str]:
    """Return all faults of a shard folder: sizes, structure, hashes, ids, counts, unlisted shards.

    Every byte is read once. An empty list means that the folder agrees with its manifest.

    Raises:
        DataError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        return str(error).splitlines()
    faults = []
    for number, shard in enumerate(manifest.shards):
        shard_faults = list(_shard_faults(folder, manifest, shard))
        count = len(shard_faults)
        verdict = f"{count} faults" if count else f"{shard.tokens:,} tokens, as written"
        logger.info("%s (%d of %d): %s", shard.name, number + 1, len(manifest.shards), verdict)
        faults += shard_faults
    faults += _tokenizer_faults(folder, manifest)
    listed = {shard.name for shard in manifest.shards}
    unlisted = [file for file in _shard_files(folder) if file.stem not in listed]
    return faults + [f"{file}: not in the manifest" for file in unlisted]


def size_faults(folder: Path, manifest: ShardManifest, shard: ShardInfo) -> list[str]:
    """Return the faults in the sizes of a shard's files and in the header of its `.idx`."""
    bin_file, idx_file = bin_path(folder, shard.name), idx_path(folder, shard.name)
    return [
        *fault_of(check_bin, bin_file, manifest, shard),
        *fault_of(_check_header, idx_file, manifest, shard),
    ]


def megatron_names(path: Path) -> list[str] | None:
    """Return the names of the pairs of `.bin` and `.idx` at a path without a manifest.

    These are all pairs of a folder, or the one of a prefix such as `data/my_text_document`. None
    means that there are none, or that they were left by an interrupted `data_prep tokenize`.
    """
    if (path / MANIFEST_NAME).exists():
        return None
    if not path.is_dir():
        pair = (path.with_name(f"{path.name}{ending}") for ending in (".bin", ".idx"))
        return [path.name] if any(file.is_file() for file in pair) else None
    names = sorted({file.stem for file in _shard_files(path)})
    return None if not names or any(map(_OUR_SHARD.fullmatch, names)) else names


def describe_megatron(folder: Path, names: list[str], *, vocab_size: int | None) -> ShardManifest:
    """Return a manifest of shards that have none, from their `.idx` files, which are fully read.

    Args:
        vocab_size: the vocabulary size if the folder has no `tokenizer/`. None means as many ids as
            the dtype allows.
    Raises:
        DataError: a `.bin` or `.idx` of a pair is missing, an `.idx` is damaged or belongs to
            another `.bin`, or the pairs have several dtypes. The message lists all faults.
    """
    faults: list[str] = []
    shards: list[ShardInfo] = []
    dtypes: dict[str, str] = {}
    for name in names:
        try:
            shard, dtype = _describe_pair(folder, name)
        except DataError as error:
            faults.append(str(error))
            continue
        shards.append(shard)
        dtypes.setdefault(dtype, name)
    if len(dtypes) > 1:
        kinds = ", ".join(f"{name} has {dtype}" for dtype, name in dtypes.items())
        faults.append(f"{folder}: {kinds}; name each pair as a source of its own")
    if faults:
        raise DataError("\n".join(faults))
    dtype = next(iter(dtypes))
    tokenizer, ids = _tokenizer_of(folder)
    return ShardManifest.model_construct(
        format="mmididx",
        dtype=dtype,
        vocab_size=ids or vocab_size or int(np.iinfo(dtype).max) + 1,
        tokenizer=tokenizer,
        bos=None,
        eos=None,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        shards=shards,
    )


def _describe_pair(folder: Path, name: str) -> tuple[ShardInfo, str]:
    bin_file, idx_file = bin_path(folder, name), idx_path(folder, name)
    for file, other in ((bin_file, idx_file), (idx_file, bin_file)):
        if not file.is_file():
            raise DataError(f"{file}: missing, but {other.name} exists; copy or make it again")
    index = read_index(idx_file)
    size = bin_file.stat().st_size
    expected = index.tokens * index.dtype.itemsize
    if size != expected:
        state = "it is truncated" if size < expected else "one of them is of another corpus"
        raise DataError(
            f"{bin_file}: got {size} bytes, its .idx says {expected} ({index.tokens} tokens of "
            f"{index.dtype.name}); {state}: copy or make both again"
        )
    info = ShardInfo.model_construct(
        name=name,
        documents=len(index.documents) - 1,
        tokens=index.tokens,
        bytes=size,
        sha256="",
        index_sha256=sha256_file(idx_file),
    )
    return info, index.dtype.name


def _tokenizer_of(folder: Path) -> tuple[TokenizerInfo, int | None]:
    """Return the tokenizer in a shard folder, and its vocabulary size or None."""
    if not (folder / "tokenizer").is_dir():
        return UNKNOWN_TOKENIZER, None
    tokenizer = load_tokenizer(folder / "tokenizer")
    for path in sorted((folder / "tokenizer").iterdir()):
        if path.is_file() and sha256_file(path) == tokenizer.sha256:
            info = TokenizerInfo(path=f"tokenizer/{path.name}", sha256=tokenizer.sha256)
            return info, tokenizer.vocab_size
    return UNKNOWN_TOKENIZER, tokenizer.vocab_size


def check_bin(path: Path, manifest: ShardManifest, shard: ShardInfo) -> None:
    """Raise a DataError if a `.bin` is missing or its size differs from the manifest's."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        fault = f"missing, but the manifest lists it with {shard.tokens} tokens"
        raise DataError(f"{path}: {fault}; copy or make it again") from None
    if size != shard.bytes:
        state = "truncated" if size < shard.bytes else "longer than it was written"
        raise DataError(
            f"{path}: got {size} bytes, the manifest says {shard.bytes} ({shard.tokens} tokens of "
            f"{manifest.dtype}); the file is {state}: copy or make it again"
        )


def check_hash(path: Path, expected: str, digest: str = "") -> None:
    """Raise a DataError if a file's SHA-256 is not the expected one.

    Args:
        digest: the SHA-256 if it was computed before.
    """
    digest = digest or sha256_file(path)
    if digest != expected:
        raise DataError(
            f"{path}: got sha256 {digest[:12]}..., the manifest says {expected[:12]}...; the file "
            "changed since it was written: copy or make it again"
        )


def checked_index(folder: Path, manifest: ShardManifest, shard: ShardInfo) -> Index:
    """Return a shard's `.idx` after all its checks, also against the manifest.

    Raises:
        DataError: its first fault.
    """
    path = idx_path(folder, shard.name)
    _check_header(path, manifest, shard)
    index = read_index(path)
    if index.tokens != shard.tokens:
        raise DataError(
            f"{path}: got {index.tokens} tokens in its sequences, the manifest says "
            f"{shard.tokens}; it belongs to another .bin: copy or make both again"
        )
    if shard.index_sha256 is not None:
        check_hash(path, shard.index_sha256)
    return index


def _check_header(path: Path, manifest: ShardManifest, shard: ShardInfo) -> None:
    try:
        header = read_header(path)
    except DataError as error:
        if path.exists():
            raise
        raise DataError(
            f"{path}: missing, but the manifest lists it; copy or make it again"
        ) from error
    if header.dtype != np.dtype(manifest.dtype).newbyteorder("<"):
        raise DataError(
            f"{path}: got {header.dtype.name}, the manifest says {manifest.dtype}; it belongs "
            "to another folder: copy or make it again"
        )
    if header.boundaries - 1 != shard.documents:
        raise DataError(
            f"{path}: got {header.boundaries - 1} documents, the manifest says {shard.documents}; "
            "it belongs to another .bin: copy or make both again"
        )


def _shard_faults(folder: Path, manifest: ShardManifest, shard: ShardInfo) -> Iterator[str]:
    path = bin_path(folder, shard.name)
    yield from (index_faults := fault_of(checked_index, folder, manifest, shard))
    if bin_faults := fault_of(check_bin, path, manifest, shard):
        yield from bin_faults
        return
    digest, highest, position = _scan(path, manifest)
    yield from fault_of(check_hash, path, shard.sha256, digest)
    if highest >= manifest.vocab_size:
        yield f"{path}: token {position} is outside the vocabulary of {manifest.vocab_size} ids"
    if not index_faults:
        yield from fault_of(_check_ends, folder, manifest, shard)


def _check_ends(folder: Path, manifest: ShardManifest, shard: ShardInfo) -> None:
    """Raise a DataError if a document does not begin with the manifest's `bos` or end with its
    `eos`.
    """
    path = bin_path(folder, shard.name)
    index = checked_index(folder, manifest, shard)
    if not index.tokens:
        return
    bounds = index.document_bounds()
    filled = np.flatnonzero(np.diff(bounds))
    tokens = np.memmap(path, np.dtype(manifest.dtype).newbyteorder("<"), mode="r")
    for kind, id, positions in (
        ("bos", manifest.bos, bounds[:-1][filled]),
        ("eos", manifest.eos, bounds[1:][filled] - 1),
    ):
        if id is not None and (wrong := np.flatnonzero(tokens[positions] != id)).size:
            number, at = filled[wrong[0]], positions[wrong[0]]
            raise DataError(
                f"{path}: document {number} has {kind} {tokens[at]}, the manifest says {id}"
            )


def _scan(path: Path, manifest: ShardManifest) -> tuple[str, int, int]:
    """Return a `.bin`'s SHA-256, its highest id as an unsigned number, and that id's position."""
    unsigned = np.dtype(f"<u{np.dtype(manifest.dtype).itemsize}")
    digest = hashlib.sha256()
    highest = -1
    position = 0
    read = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            ids = np.frombuffer(chunk, unsigned)
            if int(ids.max()) > highest:
                highest = int(ids.max())
                position = read + int(ids.argmax())
            read += len(ids)
    return digest.hexdigest(), highest, position


def _tokenizer_faults(folder: Path, manifest: ShardManifest) -> list[str]:
    path = folder / manifest.tokenizer.path
    expected = manifest.tokenizer.sha256
    if not path.is_file():
        return [f"{path}: missing, but the manifest lists it; copy it again"]
    if faults := fault_of(check_hash, path, expected):
        return faults
    tokenizer = load_tokenizer(path)
    bos = next(iter(tokenizer.prefix_ids), tokenizer.bos_id)
    return [
        f"{folder / MANIFEST_NAME}: {key} is {listed}, but {value} in {path}"
        for key, listed, value in (
            ("vocab_size", manifest.vocab_size, tokenizer.vocab_size),
            ("bos", manifest.bos, bos),
            ("eos", manifest.eos, tokenizer.eos_id),
        )
        if listed not in (None, value)
    ]


def _shard_files(folder: Path) -> list[Path]:
    """Return the `.bin` and `.idx` files in a folder, sorted by name."""
    return sorted(path for kind in ("*.bin", "*.idx") for path in folder.glob(kind))


def fault_of(check: Callable[..., object], *arguments: object) -> list[str]:
    """Run a check and return its DataError's message in a list, which is empty if it passes."""
    try:
        check(*arguments)
    except DataError as error:
        return [str(error)]
    return []
