"""Is a shard folder what its manifest says? The quick checks of opening it, and the whole ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megalite.errors import DataError
from megalite.files import sha256_file
from megalite.formats.index import Index, read_header, read_index
from megalite.formats.manifest import Manifest, ShardInfo, load_manifest
from megalite.log import logger

_CHUNK = 8 << 20  # bytes, a multiple of every item's size


def bin_path(folder: Path, shard: str) -> Path:
    """The file of a shard's token ids."""
    return folder / f"{shard}.bin"


def idx_path(folder: Path, shard: str) -> Path:
    """The file of a shard's document boundaries."""
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
    known = {path.name for shard in manifest.shards for path in _files(folder, shard)}
    strays = {path.name for kind in ("*.bin", "*.idx") for path in folder.glob(kind)} - known
    return faults + [f"{folder / name}: not in the manifest" for name in sorted(strays)]


def size_faults(folder: Path, manifest: Manifest, shard: ShardInfo) -> list[str]:
    """What the sizes of a shard's files and the header of its `.idx` show: 34 bytes are read."""
    bin_file, idx_file = _files(folder, shard)
    return _collect(
        lambda: check_bin(bin_file, manifest, shard),
        lambda: _check_header(idx_file, manifest, shard),
    )


def check_bin(path: Path, manifest: Manifest, shard: ShardInfo) -> None:
    """Raise a DataError unless a `.bin` is there and has the size that the manifest says."""
    if not path.is_file():
        raise DataError(f"{path}: missing, the manifest lists it with {shard.tokens} tokens")
    size = path.stat().st_size
    if size != shard.bytes:
        state = "cut" if size < shard.bytes else "longer than it was written"
        raise DataError(
            f"{path}: {size} bytes, the manifest says {shard.bytes} ({shard.tokens} tokens of "
            f"{manifest.dtype}); the file is {state}: copy or make it again"
        )


def check_hash(path: Path, expected: str) -> None:
    """Raise a DataError unless a file's SHA-256 is the expected one."""
    _compare_hash(path, sha256_file(path), expected)


def checked_index(folder: Path, manifest: Manifest, shard: ShardInfo) -> Index:
    """A shard's `.idx`, compared whole with itself and with the manifest.

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


def _check_header(path: Path, manifest: Manifest, shard: ShardInfo) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing, the manifest lists it")
    header = read_header(path)
    if header.dtype.name != manifest.dtype:
        raise DataError(
            f"{path}: holds {header.dtype.name}, the manifest says {manifest.dtype}; it belongs "
            "to another folder"
        )
    if header.boundaries - 1 != shard.documents:
        raise DataError(
            f"{path}: {header.boundaries - 1} documents, the manifest says {shard.documents}; it "
            "belongs to another .bin"
        )


def _shard_faults(folder: Path, manifest: Manifest, shard: ShardInfo) -> Iterator[str]:
    path = bin_path(folder, shard.name)
    yield from _collect(lambda: checked_index(folder, manifest, shard))
    if sizes := _collect(lambda: check_bin(path, manifest, shard)):
        yield from sizes
        return
    digest, (highest, place) = _scan(path, manifest)
    yield from _collect(lambda: _compare_hash(path, digest, shard.sha256))
    if highest >= manifest.vocab_size:
        yield (f"{path}: token {place} lies outside the vocabulary of {manifest.vocab_size} ids")


def _scan(path: Path, manifest: Manifest) -> tuple[str, tuple[int, int]]:
    """A `.bin`'s SHA-256, its highest id (a negative one counts as huge) and where that stands."""
    unsigned = np.dtype(f"<u{np.dtype(manifest.dtype).itemsize}")
    digest, highest, place, read = hashlib.sha256(), -1, 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            ids = np.frombuffer(chunk, unsigned)
            if int(ids.max()) > highest:
                highest, place = int(ids.max()), read + int(ids.argmax())
            read += len(ids)
    return digest.hexdigest(), (highest, place)


def _tokenizer_faults(folder: Path, manifest: Manifest) -> list[str]:
    path, expected = folder / manifest.tokenizer.path, manifest.tokenizer.sha256
    if not path.is_file():
        return [f"{path}: missing, the manifest lists it"]
    return _collect(lambda: check_hash(path, expected))


def _compare_hash(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(
            f"{path}: sha256 {found[:12]}..., the manifest says {expected[:12]}...; bytes changed "
            "since it was written: copy or make it again"
        )


def _files(folder: Path, shard: ShardInfo) -> tuple[Path, Path]:
    return bin_path(folder, shard.name), idx_path(folder, shard.name)


def _collect(*checks: Callable[[], object]) -> list[str]:
    faults = []
    for check in checks:
        try:
            check()
        except DataError as error:
            faults.append(str(error))
    return faults
