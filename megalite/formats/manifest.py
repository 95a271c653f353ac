"""A shard folder's `manifest.json`: what the shards hold, how they were made, and their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from megalite.errors import DataError
from megalite.files import read_regular, write_json

MANIFEST_NAME = "manifest.json"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A plain name: a manifest from elsewhere must not reach outside its folder.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
TokenizerPath = Annotated[
    str, StringConstraints(pattern=r"^tokenizer/[A-Za-z0-9_-][A-Za-z0-9._-]*$")
]
# The names of `index.DTYPES`.
DtypeName = Literal["uint8", "int8", "int16", "int32", "int64", "uint16"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class TokenizerInfo(_Frozen):
    """The tokenizer's file, relative to the shard folder, and that file's hash.

    Both are empty if unknown (`UNKNOWN_TOKENIZER`), which a `manifest.json` may not say.
    """

    path: TokenizerPath
    sha256: Sha256


UNKNOWN_TOKENIZER = TokenizerInfo.model_construct(path="", sha256="")


class ShardInfo(_Frozen):
    """One pair of `NAME.bin` and `NAME.idx`; `bytes` and `sha256` are the `.bin`'s.

    If there is no manifest, `sha256` is empty and `index_sha256` is what was found.
    """

    name: Name
    documents: Count
    tokens: Count
    bytes: Count
    sha256: Sha256
    index_sha256: Sha256 | None = None  # absent where other tools wrote the manifest


class SourceInfo(_Frozen):
    """One input of the command that made the shards, and what came of it."""

    input: str
    files: Count
    bytes: Count  # of UTF-8 text, decompressed, in the documents
    documents: Count
    tokens: Count
    bad_records: Count


class ShardManifest(_Frozen):
    """The content of `manifest.json`. `bos` and `eos` are ids put around each document, or null.

    Format "mmididx" is of shards without a `manifest.json`: its values then come from their `.idx`
    files, and `vocab_size` is a bound from elsewhere.
    """

    format: Literal["megalite-shards-1", "mmididx"] = "megalite-shards-1"
    dtype: DtypeName
    vocab_size: Annotated[int, Field(gt=0)]
    tokenizer: TokenizerInfo
    bos: Count | None
    eos: Count | None
    documents: Count
    tokens: Count
    shards: list[ShardInfo]
    sources: list[SourceInfo] = []
    arguments: dict[str, Any] = {}

    def counts(self) -> str:
        """Return the numbers of shards, documents and tokens, in words."""
        counted = {"shard": len(self.shards), "document": self.documents, "token": self.tokens}
        return ", ".join(f"{n:,} {name}{'' if n == 1 else 's'}" for name, n in counted.items())

    def contradictions(self) -> list[str]:
        """Return the contradictions between the manifest's own numbers."""
        dtype = np.dtype(self.dtype)
        faults = []
        if self.vocab_size - 1 > np.iinfo(dtype).max:
            faults.append(f"vocab_size {self.vocab_size} does not fit in {self.dtype}")
        for key, id in (("bos", self.bos), ("eos", self.eos)):
            if id is not None and id >= self.vocab_size:
                faults.append(f"{key} {id} lies outside vocab_size {self.vocab_size}")
        for key in ("documents", "tokens"):
            total = sum(getattr(shard, key) for shard in self.shards)
            if total != getattr(self, key):
                faults.append(f"{key} {getattr(self, key)}, but its shards add up to {total}")
        for shard in self.shards:
            if shard.bytes != shard.tokens * dtype.itemsize:
                faults.append(
                    f"shard {shard.name}: {shard.bytes} bytes for {shard.tokens} tokens of "
                    f"{self.dtype}, which take {shard.tokens * dtype.itemsize}"
                )
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            faults.append("two shards have the same name")
        return faults


def load_manifest(folder: Path | str) -> ShardManifest:
    """Read and check `folder/manifest.json`.

    Raises:
        DataError: no such folder, no manifest, or one that is malformed or contradicts itself;
            every fault is named.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        manifest = ShardManifest.model_validate_json(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_absent(folder)) from None
    except ValidationError as error:
        raise DataError(_lines(path, _describe(error))) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if manifest.format != "megalite-shards-1":
        raise DataError(f"{path}: format {manifest.format!r} is of shards without a manifest")
    if faults := manifest.contradictions():
        raise DataError(_lines(path, faults))
    return manifest


def write_manifest(folder: Path, manifest: ShardManifest) -> None:
    """Write `folder/manifest.json`; last of all files, since it declares them complete."""
    assert not (faults := manifest.contradictions()), faults
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def fingerprint(manifest: ShardManifest) -> str:
    """Return 64 hexadecimal digits that are equal if the tokens and the order of shards are equal.

    The folder's path, the names of its shards, their sources and the arguments do not matter.
    Without a manifest the hashes of the `.idx` files and the sizes of the `.bin` files stand for
    the tokens, which nobody hashed. Vocabulary and tokenizer are unknown then and do not matter
    either.
    """
    defining = manifest.model_dump(
        mode="json", exclude={"sources": True, "arguments": True, "tokenizer": {"path"}}
    )
    if manifest.format == "mmididx":
        del defining["vocab_size"], defining["tokenizer"]
    for shard in defining["shards"]:
        del shard["name"]
    canonical = json.dumps(defining, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _absent(folder: Path) -> str:
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.exists() else "does not exist"
        if folder.exists() and folder.suffix in (".bin", ".idx"):
            return f"{folder} {found}; name Megatron's pair without its ending: {folder.stem}"
        return f"shard folder {folder} {found}; make one with `python -m data_prep tokenize`"
    return (
        f"shard folder {folder} has no {MANIFEST_NAME}; was `data_prep tokenize` interrupted, "
        "or is this another folder?"
    )


def _describe(error: ValidationError) -> list[str]:
    faults = []
    for fault in error.errors(include_url=False):
        if fault["type"] == "json_invalid":
            return [f"not a JSON file that can be read: {fault['msg']}"]
        place = ".".join(str(part) for part in fault["loc"]) or "the whole file"
        found = "" if fault["type"] == "missing" else f", found {str(fault['input'])[:60]!r}"
        faults.append(f"{place}: {fault['msg']}{found}")
    return faults


def _lines(path: Path, faults: Sequence[str]) -> str:
    return "\n".join(f"{path}: {fault}" for fault in faults)
