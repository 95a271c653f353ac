"""Is a shard folder what its manifest says? The quick checks of opening it, and the whole ones."""

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
    """Everything wrong with a shard folder: sizes, structure, hashes, ids, counts, stray shards.

    Every byte is read once. An empty list says that the folder is what its manifest says.

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
        found = list(_shard_faults(folder, manifest, shard))
        verdict = f"{len(found)} faults" if found else f"{shard.tokens:,} tokens, as written"
        logger.info("%s (%d of %d): %s", shard.name, number + 1, len(manifest.shards), verdict)
        faults += found
    faults += _tokenizer_faults(folder, manifest)
    known = {shard.name for shard in manifest.shards}
    strays = [file for file in _halves(folder) if file.stem not in known]
    return faults + [f"{file}: not in the manifest" for file in strays]


def size_faults(folder: Path, manifest: ShardManifest, shard: ShardInfo) -> list[str]:
    """Return what the sizes of a shard's files and the header of its `.idx` show: 34 bytes are
    read.
    """
    bin_file, idx_file = bin_path(folder, shard.name), idx_path(folder, shard.name)
    return [
        *fault_of(check_bin, bin_file, manifest, shard),
        *fault_of(_check_header, idx_file, manifest, shard),
    ]


def megatron_names(path: Path) -> list[str] | None:
    """Return the pairs that `path` means if it is no folder with a manifest: all of a folder, or
    the one of a prefix such as `data/my_text_document`; None if there is nothing of the kind.

    Our own shards without a manifest are not taken: `tokenize` was interrupted there.
    """
    if (path / MANIFEST_NAME).exists():
        return None
    if not path.is_dir():
        pair = (path.with_name(f"{path.name}{ending}") for ending in (".bin", ".idx"))
        return [path.name] if any(file.is_file() for file in pair) else None
    names = sorted({file.stem for file in _halves(path)})
    return None if not names or any(map(_OUR_SHARD.fullmatch, names)) else names


def describe_megatron(folder: Path, names: list[str], *, vocab_size: int | None) -> ShardManifest:
    """Return a manifest of shards that have none, from their `.idx` files, each of which is read
    whole.

    Args:
        vocab_size: the bound of ids where no `tokenizer/` lies next to them; None: the dtype's.

    Raises:
        DataError: a file without its other half, an `.idx` that is damaged or not its `.bin`'s,
            pairs of different dtypes; all of them.
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
        kinds = ", ".join(f"{name} holds {dtype}" for dtype, name in dtypes.items())
        faults.append(f"{folder}: {kinds}; name them one by one, as sources of their own")
    if faults:
        raise DataError("\n".join(faults))
    dtype = next(iter(dtypes))
    tokenizer, ids = _tokenizer_beside(folder)
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
            raise DataError(f"{file}: missing next to {other.name}; copy or make it again")
    index = read_index(idx_file)
    size = bin_file.stat().st_size
    expected = index.tokens * index.dtype.itemsize
    if size != expected:
        state = "it is cut" if size < expected else "one of them is of another corpus"
        raise DataError(
            f"{bin_file}: {size} bytes, its .idx says {expected} ({index.tokens} tokens of "
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


def _tokenizer_beside(folder: Path) -> tuple[TokenizerInfo, int | None]:
    """Return the tokenizer in a folder and how many ids it has; unknown if there is none."""
    if not (folder / "tokenizer").is_dir():
        return UNKNOWN_TOKENIZER, None
    tokenizer = load_tokenizer(folder / "tokenizer")
    for path in sorted((folder / "tokenizer").iterdir()):
        if path.is_file() and sha256_file(path) == tokenizer.sha256:
            info = TokenizerInfo(path=f"tokenizer/{path.name}", sha256=tokenizer.sha256)
            return info, tokenizer.vocab_size
    return UNKNOWN_TOKENIZER, tokenizer.vocab_size


def check_bin(path: Path, manifest: ShardManifest, shard: ShardInfo) -> None:
    """Raise a DataError unless a `.bin` is there and has the size that the manifest says."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        told = f"missing, the manifest lists it with {shard.tokens} tokens"
        raise DataError(f"{path}: {told}") from None
    if size != shard.bytes:
        state = "cut" if size < shard.bytes else "longer than it was written"
        raise DataError(
            f"{path}: {size} bytes, the manifest says {shard.bytes} ({shard.tokens} tokens of "
            f"{manifest.dtype}); the file is {state}: copy or make it again"
        )


def check_hash(path: Path, expected: str, found: str = "") -> None:
    """Raise a DataError unless a file's SHA-256, `found` if it is known, is the expected one."""
    found = found or sha256_file(path)
    if found != expected:
        raise DataError(
            f"{path}: sha256 {found[:12]}..., the manifest says {expected[:12]}...; bytes changed "
            "since it was written: copy or make it again"
        )


def checked_index(folder: Path, manifest: ShardManifest, shard: ShardInfo) -> Index:
    """Return a shard's `.idx`, compared whole with itself and with the manifest.

    Raises:
        DataError: the first thing that is wrong with it.
    """
    path = idx_path(folder, shard.name)
    _check_header(path, manifest, shard)
    index = read_index(path)
    if index.tokens != shard.tokens:
        raise DataError(
            f"{path}: its sequences add up to {index.tokens} tokens, the .bin holds "
            f"{shard.tokens}; it belongs to another .bin"
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
        raise DataError(f"{path}: missing, the manifest lists it") from error
    if header.dtype != np.dtype(manifest.dtype).newbyteorder("<"):
        raise DataError(
            f"{path}: holds {header.dtype.name}, the manifest says {manifest.dtype}; it belongs "
            "to another folder"
        )
    if header.boundaries - 1 != shard.documents:
        raise DataError(
            f"{path}: {header.boundaries - 1} documents, the manifest says {shard.documents}; it "
            "belongs to another .bin"
        )


def _shard_faults(folder: Path, manifest: ShardManifest, shard: ShardInfo) -> Iterator[str]:
    path = bin_path(folder, shard.name)
    yield from (stale := fault_of(checked_index, folder, manifest, shard))
    if sizes := fault_of(check_bin, path, manifest, shard):
        yield from sizes
        return
    digest, highest, place = _scan(path, manifest)
    yield from fault_of(check_hash, path, shard.sha256, digest)
    if highest >= manifest.vocab_size:
        yield f"{path}: token {place} lies outside the vocabulary of {manifest.vocab_size} ids"
    if not stale:
        yield from fault_of(_check_ends, folder, manifest, shard)


def _check_ends(folder: Path, manifest: ShardManifest, shard: ShardInfo) -> None:
    """Check that documents begin with the manifest's `bos` and end with its `eos`."""
    path = bin_path(folder, shard.name)
    index = checked_index(folder, manifest, shard)
    if not index.tokens:
        return
    bounds = index.document_bounds()
    filled = np.flatnonzero(np.diff(bounds))
    tokens = np.memmap(path, np.dtype(manifest.dtype).newbyteorder("<"), mode="r")
    for kind, id, places in (
        ("bos", manifest.bos, bounds[:-1][filled]),
        ("eos", manifest.eos, bounds[1:][filled] - 1),
    ):
        if id is not None and (wrong := np.flatnonzero(tokens[places] != id)).size:
            number, at = filled[wrong[0]], places[wrong[0]]
            raise DataError(
                f"{path}: document {number} has id {tokens[at]} where the manifest says {kind} {id}"
            )


def _scan(path: Path, manifest: ShardManifest) -> tuple[str, int, int]:
    """Return a `.bin`'s SHA-256, its highest id (a negative one counts as huge) and where that
    stands.
    """
    unsigned = np.dtype(f"<u{np.dtype(manifest.dtype).itemsize}")
    digest = hashlib.sha256()
    highest = -1
    place = 0
    read = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            ids = np.frombuffer(chunk, unsigned)
            if int(ids.max()) > highest:
                highest = int(ids.max())
                place = read + int(ids.argmax())
            read += len(ids)
    return digest.hexdigest(), highest, place


def _tokenizer_faults(folder: Path, manifest: ShardManifest) -> list[str]:
    path = folder / manifest.tokenizer.path
    expected = manifest.tokenizer.sha256
    if not path.is_file():
        return [f"{path}: missing, the manifest lists it"]
    if faults := fault_of(check_hash, path, expected):
        return faults
    tokenizer = load_tokenizer(path)
    begins = next(iter(tokenizer.prefix_ids), tokenizer.bos_id)
    return [
        f"{folder / MANIFEST_NAME}: {key} is {told}, the tokenizer next to it says {own}"
        for key, told, own in (
            ("vocab_size", manifest.vocab_size, tokenizer.vocab_size),
            ("bos", manifest.bos, begins),
            ("eos", manifest.eos, tokenizer.eos_id),
        )
        if told not in (None, own)
    ]


def _halves(folder: Path) -> list[Path]:
    """Return the `.bin` and `.idx` files in a folder, by name."""
    return sorted(path for kind in ("*.bin", "*.idx") for path in folder.glob(kind))


def fault_of(check: Callable[..., object], *arguments: object) -> list[str]:
    """Return what a check raises as a DataError, in a list; an empty one where it raises
    nothing.
    """
    try:
        check(*arguments)
    except DataError as error:
        return [str(error)]
    return []
