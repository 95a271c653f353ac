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

    Shards without a manifest may have `UNKNOWN_TOKENIZER`, in which both are empty.
    """

    path: TokenizerPath
    sha256: Sha256


UNKNOWN_TOKENIZER = TokenizerInfo.model_construct(path="", sha256="")


class ShardInfo(_Frozen):
    """One pair of `NAME.bin` and `NAME.idx`; `bytes` and `sha256` are the `.bin`'s.

    Shards without a manifest have an empty `sha256`, and in `index_sha256` the hash of their `.idx`
    file as read.
    """

    name: Name
    documents: Count
    tokens: Count
    bytes: Count
    sha256: Sha256
    index_sha256: Sha256 | None = None  # missing if another tool wrote the manifest


class SourceInfo(_Frozen):
    """Counts of one input of the command that made the shards."""

    input: str
    files: Count
    bytes: Count  # UTF-8 text of the documents, after decompression
    documents: Count
    tokens: Count
    bad_records: Count


class ShardManifest(_Frozen):
    """The content of `manifest.json`. `bos` and `eos` are the ids around each document, or None.

    Shards without a `manifest.json` have the format "mmididx". Their values come from the `.idx`
    files; `vocab_size` is the tokenizer's, the caller's, or the largest that the dtype allows.
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
        """Return the numbers of shards, documents and tokens, such as "2 shards, 1 document"."""
        numbers = {"shard": len(self.shards), "document": self.documents, "token": self.tokens}
        return ", ".join(f"{n:,} {name}{'' if n == 1 else 's'}" for name, n in numbers.items())

    def contradictions(self) -> list[str]:
        """Return the contradictions among the manifest's numbers."""
        dtype = np.dtype(self.dtype)
        faults = []
        if self.vocab_size - 1 > np.iinfo(dtype).max:
            faults.append(f"vocab_size {self.vocab_size} does not fit in {self.dtype}")
        for key, id in (("bos", self.bos), ("eos", self.eos)):
            if id is not None and id >= self.vocab_size:
                faults.append(f"{key} {id} is not below vocab_size {self.vocab_size}")
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
        DataError: the folder or its manifest is missing, or the manifest is malformed or
            contradicts itself. The message lists all faults.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        manifest = ShardManifest.model_validate_json(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_missing_manifest(folder)) from None
    except ValidationError as error:
        raise DataError(_lines(path, _describe(error))) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if manifest.format != "megalite-shards-1":
        raise DataError(f"{path}: got format {manifest.format!r}; set it to 'megalite-shards-1'")
    if faults := manifest.contradictions():
        raise DataError(_lines(path, faults))
    return manifest


def write_manifest(folder: Path, manifest: ShardManifest) -> None:
    """Write `folder/manifest.json`. Call last: the manifest declares all other files complete."""
    assert not (faults := manifest.contradictions()), faults
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def fingerprint(manifest: ShardManifest) -> str:
    """Return a SHA-256 of the tokens and the order of shards.

    The folder's path, its shards' names, their sources and the arguments do not enter the hash.
    Shards without a manifest have no hash of their tokens: the hashes of their `.idx` files and the
    sizes of their `.bin` files enter instead. Their vocabulary and tokenizer do not enter.
    """
    content = manifest.model_dump(
        mode="json", exclude={"sources": True, "arguments": True, "tokenizer": {"path"}}
    )
    if manifest.format == "mmididx":
        del content["vocab_size"], content["tokenizer"]
    for shard in content["shards"]:
        del shard["name"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _missing_manifest(folder: Path) -> str:
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist"
        if folder.exists() and folder.suffix in (".bin", ".idx"):
            return f"{folder} {state}; name Megatron's pair without its ending: {folder.stem}"
        return f"shard folder {folder} {state}; make one with `python -m data_prep tokenize`"
    return (
        f"shard folder {folder} has no {MANIFEST_NAME}; check the path, or run `data_prep "
        "tokenize` again if it was interrupted"
    )


def _describe(error: ValidationError) -> list[str]:
    faults = []
    for fault in error.errors(include_url=False):
        if fault["type"] == "json_invalid":
            return [f"not valid JSON: {fault['msg']}"]
        place = ".".join(str(part) for part in fault["loc"]) or "the whole file"
        value = "" if fault["type"] == "missing" else f", got {str(fault['input'])[:60]!r}"
        faults.append(f"{place}: {fault['msg']}{value}")
    return faults


def _lines(path: Path, faults: Sequence[str]) -> str:
    return "\n".join(f"{path}: {fault}" for fault in faults)
