"""A checkpoint folder on disk: its manifest, its checks, and which of several to trust.

    step_00001000/
        model-*.safetensors  exp_avg-*.safetensors ...   named tensors, canonical names and shapes
        config.json  tokenizer/                          enough to evaluate and generate anywhere
        manifest.json                                    written last; hashes of all the others

No layout is recorded, because none matters: a tensor has one name and one whole shape.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from megalite import __version__, files
from megalite.errors import CheckpointError, OtherVersion

Floats = npt.NDArray[np.float32]

FORMAT = "megalite-checkpoint-1"
_FAMILY = "megalite-checkpoint-"  # of every version
MANIFEST = "manifest.json"
WEIGHT = "weight"  # the state every tensor has; the others are the optimizer's
_LONGEST_HEADER = 1 << 28  # bytes; some hundred a tensor
_PIECE = 1 << 22  # bytes written and hashed while they are in the cache
_STEP_NAME = re.compile(r"step_(\d{8,})")


class _Entry(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants"
    )


class FileEntry(_Entry):
    """A file of the folder, by its path relative to it."""

    bytes: int
    sha256: str


class StateEntry(_Entry):
    """One fp32 state of a tensor: the file that holds it, and the hash of its bytes."""

    file: str
    sha256: str


class TensorEntry(_Entry):
    """A canonical tensor: its whole shape, and its states ("weight", "exp_avg", ...)."""

    shape: list[int]
    states: dict[str, StateEntry]


class CheckpointManifest(_Entry):
    """The content of a checkpoint, and the progress of the run that wrote it."""

    format: Literal["megalite-checkpoint-1"]
    step: int
    samples: int  # place in the data order
    tokens: int
    valid_loss: float | None = None  # nats; of the validation at this very step
    progress: dict[str, Any]  # the engine's plain numbers: updates taken, loss scale
    optimizer: dict[str, Any]
    data_fingerprint: str
    tokenizer_sha256: str
    versions: dict[str, str]
    deepspeed: dict[str, Any] = {}  # the installed DeepSpeed's own defaults
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]


def other_format(folder: Path) -> str | None:
    """Return what a folder's manifest calls itself, if it is readable and not a checkpoint's."""
    try:
        found = files.read_json(folder / MANIFEST)["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if str(found).startswith(_FAMILY) else str(found)


def files_of_other_states(manifest: CheckpointManifest) -> set[str]:
    """Files that hold no weights, but what an optimizer keeps."""
    states = [s for tensor in manifest.tensors.values() for s in tensor.states.items()]
    weights = {entry.file for state, entry in states if state == WEIGHT}
    return {entry.file for _, entry in states} - weights


def folder_name(step: int) -> str:
    """Return the published name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest with a checksum of its own content."""
    content = manifest.model_dump(mode="json")
    files.write_json(folder / MANIFEST, {**content, "checksum": _checksum(content)})


def record_valid_loss(folder: Path, valid_loss: float) -> None:
    """Replace the validation loss in a published checkpoint's manifest.

    Raises:
        OSError, CheckpointError: the manifest cannot be read or written; it stays as it was.
    """
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"valid_loss": valid_loss}))


def write_tensors(path: Path, tensors: Mapping[str, Floats]) -> tuple[FileEntry, dict[str, str]]:
    """Write and sync a safetensors file, hashing as it goes: no byte is read again.

    Args:
        tensors: contiguous, by name.
    Returns:
        the file's entry, and the SHA-256 of each tensor's bytes.
    """
    start, size = _start({name: list(tensor.shape) for name, tensor in tensors.items()})
    whole = hashlib.sha256(start)
    hashes = dict[str, str]()
    # a tensor's own hash is made next to the file's: neither needs the interpreter
    with open(path, "wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(start)
        for name, tensor in tensors.items():
            data = tensor.reshape(-1).view(np.uint8).data
            own = pool.submit(hashlib.sha256, data)
            for at in range(0, len(data), _PIECE):
                piece = data[at : at + _PIECE]
                file.write(piece)
                whole.update(piece)
            hashes[name] = own.result().hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(bytes=size, sha256=whole.hexdigest()), hashes


def _start(shapes: Mapping[str, list[int]]) -> tuple[bytes, int]:
    """Return the first bytes of a file of these fp32 tensors, and the size of the file."""
    header = dict[str, Any]()
    offset = 0
    for name, shape in shapes.items():
        place = [offset, offset := offset + 4 * math.prod(shape)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + offset


def read_tensor(path: Path, name: str, target: Floats, box: tuple[slice, ...]) -> None:
    """Read a box of a tensor of a safetensors file into `target`, of the box's shape.

    Elements that are adjacent in both are copied directly; for columns, whole rows are read, some
    at a time. Nothing is mapped: a page that cannot be read kills the process.

    Raises:
        OSError, ValueError, KeyError: the file cannot be read, or is not what the manifest says.
    """
    with open(path, "rb", buffering=0) as file:
        shape, offset = _find_tensor(file, name)
        if len(shape) != len(box) or any(b.stop > n for b, n in zip(box, shape, strict=True)):
            raise ValueError(f"{name} has shape {shape}")
        row = 4 * math.prod(shape[1:])
        whole_rows = all(
            (b.start, b.stop) == (0, n) for b, n in zip(box[1:], shape[1:], strict=True)
        )
        if box:
            file.seek(offset + box[0].start * row)
        else:
            file.seek(offset)
        if whole_rows and target.flags.c_contiguous:
            _read_into(file, target, name)
            return
        at_once = max(1, _PIECE // row)
        cut = (slice(None), *box[1:])
        for first in range(0, len(target), at_once):
            part = target[first : first + at_once]
            rows = np.empty((len(part), *shape[1:]), np.float32)
            _read_into(file, rows, name)
            part[...] = rows[cut]


def _find_tensor(file: FileIO, name: str) -> tuple[list[int], int]:
    """Return an fp32 tensor's shape and its first byte, by the header of a safetensors file.

    Raises:
        OSError, ValueError: the file cannot be read; its header is none, or describes no such
            tensor within the file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, _LONGEST_HEADER):
        raise ValueError(f"its header should have {length} bytes")
    header = files.parse_json(file.read(length))
    entry = header.get(name) if isinstance(header, dict) else None
    if not isinstance(entry, dict):
        raise ValueError(f"its header describes no {name}")
    dtype, shape, ends = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _are_counts(shape) or not _are_counts(ends) or (dtype, len(ends)) != ("F32", 2):
        raise ValueError(f"{name} is {dtype!s:.20} of shape {shape!s:.40}")
    first, stop = (8 + length + end for end in ends)
    if stop - first != 4 * math.prod(shape) or stop > size:
        raise ValueError(f"{name} of shape {shape!s:.40} lies at {first} to {stop} of {size}")
    return shape, first


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    plain = isinstance(value, list) and all(type(item) is int for item in value)
    return plain and all(0 <= item < 1 << 60 for item in value)


def _read_into(file: FileIO, target: Floats, name: str) -> None:
    view = target.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    if done < len(view):
        raise OSError(f"{name} ends after {done} of {len(view)} bytes")


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read and check a manifest.

    Raises:
        CheckpointError: absent, unreadable, no checkpoint's, or changed since it was written.
        OtherVersion: as it was written, by a MegaLite whose checkpoints this one does not read.
    """
    path = folder / MANIFEST
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: not a whole checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    try:
        intact = isinstance(content, dict) and content.pop("checksum", None) == _checksum(content)
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read: it nests too deep") from None
    if found != FORMAT and not (intact and str(found).startswith(_FAMILY)):
        raise CheckpointError(f"{path}: format {found!r} found, this version reads {FORMAT!r}")
    if not intact:
        raise CheckpointError(f"{path} was changed or damaged since it was written (checksum)")
    try:
        manifest = CheckpointManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise OtherVersion(
            f"{path} is whole, but MegaLite {__version__} does not read it: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}; written by {_writer(content)}, "
            "with which it can be used"
        ) from None
    if (outside := _unlisted(manifest)) is not None:
        what = f"the file {outside!r:.80}, which is no file of the checkpoint's own"
        raise CheckpointError(f"{path} names {what}; use another checkpoint")
    if _STEP_NAME.fullmatch(folder.name) and step_of(folder) != manifest.step:
        raise CheckpointError(
            f"{folder} holds step {manifest.step}: it was renamed; its own name is "
            f"{folder_name(manifest.step)}"
        )
    return manifest


def _unlisted(manifest: CheckpointManifest) -> str | None:
    """Return the first file that lies outside the folder, or holds a tensor and is not listed."""
    for name in manifest.files:
        if not files.is_inner_path(name):
            return name
    for tensor in manifest.tensors.values():
        for state in tensor.states.values():
            if state.file not in manifest.files:
                return state.file
    return None


def _writer(content: Mapping[str, Any]) -> str:
    versions = content.get("versions")
    name = versions.get("megalite") if isinstance(versions, dict) else None
    return f"MegaLite {name or 'of another version'}"


def published(root: Path) -> list[Path]:
    """Return the published checkpoints below `root`, newest first, whole or not."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def best(folders: Iterable[Path]) -> Path | None:
    """Return the checkpoint of the lowest validation loss, the earliest of equal ones.

    Those not validated at their very step, or whose manifest cannot be read, do not count.
    """
    losses = dict[Path, float]()
    for folder in folders:
        try:
            loss = read_manifest(folder).valid_loss
        except (CheckpointError, OtherVersion):
            continue
        if loss is not None:
            losses[folder] = loss
    return min(losses, key=lambda folder: (losses[folder], step_of(folder)), default=None)


def step_of(folder: Path) -> int:
    """Return the step a published checkpoint was taken after, from its name."""
    return int(folder.name.removeprefix("step_"))


def share(manifest: CheckpointManifest, rank: int, ranks: int) -> set[str]:
    """Return the files that one of several ranks checks, so that each reads about as many bytes."""
    loads = [0] * ranks
    mine = set()
    for name, entry in sorted(manifest.files.items(), key=lambda item: -item[1].bytes):
        least = loads.index(min(loads))
        loads[least] += entry.bytes
        if least == rank:
            mine.add(name)
    return mine


def damage(
    folder: Path,
    manifest: CheckpointManifest,
    names: Iterable[str] | None = None,
    *,
    threads: int = 1,
    tensors: bool = True,
) -> list[str]:
    """Return what is wrong with the named files (default: all): missing, of another size, or hash.

    Args:
        threads: files hashed at once, which leaves the interpreter alone.
        tensors: False omits the tensors' own bytes, for a caller that compares their hashes: the
            rest of such a file follows from the manifest.
    """
    wanted = sorted(manifest.files if names is None else names)
    held = dict[str, set[str]]()
    if not tensors:
        for name, tensor in manifest.tensors.items():
            for state in tensor.states.values():
                held.setdefault(state.file, set()).add(name)

    def fault(name: str) -> str | None:
        start = None
        if name in held:
            start = {tensor: manifest.tensors[tensor].shape for tensor in held[name]}
        return _fault(folder / name, manifest.files[name], start)

    with ThreadPoolExecutor(threads) as pool:
        return [found for found in pool.map(fault, wanted) if found is not None]


def _fault(path: Path, entry: FileEntry, held: Mapping[str, list[int]] | None) -> str | None:
    try:
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != entry.bytes:
            return f"{path}: {entry.bytes} bytes were written, {size} are there"
        if held is not None:
            if not _starts_with(path, held):
                return f"{path} does not begin as it was written"
        elif files.sha256_file(path) != entry.sha256:
            return f"{path}: its bytes are not those that were written (sha256)"
    except OSError as error:  # raised on one rank it would leave the others waiting
        return f"{path} cannot be read: {error}"
    return None


def _starts_with(path: Path, held: Mapping[str, list[int]]) -> bool:
    """Return whether a file has the header of just these tensors, in its own order."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            return False
        text = file.read(length)
    try:
        names = list(files.parse_json(text))
        start, _ = _start({name: held[name] for name in names})
    except (ValueError, KeyError, TypeError):
        return False
    return len(names) == len(held) and start[8:] == text and len(text) == length


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
