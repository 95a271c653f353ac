"""Checkpoint folders on disk: the manifest, integrity checks, and the choice of a checkpoint.

    step_00001000/
        model-*.safetensors  exp_avg-*.safetensors ...   tensors by canonical name, unsharded
        config.json  tokenizer/                          needed to evaluate and generate
        manifest.json                                    written last; hashes of all other files

A checkpoint does not depend on the layout of the run: every tensor has one name and its full shape.
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
_FORMAT_PREFIX = "megalite-checkpoint-"  # common to all versions
MANIFEST = "manifest.json"
WEIGHT = "weight"  # every tensor has this state; all others are optimizer states
_LONGEST_HEADER = 1 << 28  # bytes; a tensor takes about a hundred
_CHUNK = 1 << 22  # bytes, written and hashed while they are in the CPU's cache
_STEP_NAME = re.compile(r"step_(\d{8,})")


class _Entry(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants"
    )


class FileEntry(_Entry):
    """Size and hash of a file of the checkpoint."""

    bytes: int
    sha256: str


class StateEntry(_Entry):
    """One fp32 state of a tensor: the file that contains it, and the hash of its bytes."""

    file: str
    sha256: str


class TensorEntry(_Entry):
    """A canonical tensor: its full shape, and its states ("weight", "exp_avg", ...) by name."""

    shape: list[int]
    states: dict[str, StateEntry]


class CheckpointManifest(_Entry):
    """The content of a checkpoint, and the progress of the run that wrote it."""

    format: Literal["megalite-checkpoint-1"]
    step: int
    samples: int  # consumed so far: the position in the data order
    tokens: int
    valid_loss: float | None = None  # nats; None if there was no validation at this step
    progress: dict[str, Any]  # the engine's scalars: updates made, loss scale
    optimizer: dict[str, Any]
    data_fingerprint: str
    tokenizer_sha256: str
    versions: dict[str, str]
    deepspeed: dict[str, Any] = {}  # the defaults of the installed DeepSpeed
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]


def other_format(folder: Path) -> str | None:
    """Return the format in a folder's manifest, or None if it is a checkpoint's or unreadable."""
    try:
        name = str(files.read_json(folder / MANIFEST)["format"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if name.startswith(_FORMAT_PREFIX) else name


def optimizer_files(manifest: CheckpointManifest) -> set[str]:
    """Return the files that contain optimizer states and no weights."""
    states = [s for tensor in manifest.tensors.values() for s in tensor.states.items()]
    weights = {entry.file for state, entry in states if state == WEIGHT}
    return {entry.file for _, entry in states} - weights


def folder_name(step: int) -> str:
    """Return the folder name of the published checkpoint of a step."""
    return f"step_{step:08d}"


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest, with a checksum of its content."""
    content = manifest.model_dump(mode="json")
    files.write_json(folder / MANIFEST, {**content, "checksum": _checksum(content)})


def record_valid_loss(folder: Path, valid_loss: float) -> None:
    """Replace the validation loss in a published checkpoint's manifest.

    Raises:
        OSError, CheckpointError: the manifest cannot be read or written; it stays unchanged.
    """
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"valid_loss": valid_loss}))


def write_tensors(path: Path, tensors: Mapping[str, Floats]) -> tuple[FileEntry, dict[str, str]]:
    """Write and sync a safetensors file, and hash it while writing.

    Args:
        tensors: contiguous arrays by name.
    Returns:
        the file's entry, and the SHA-256 of each tensor's bytes.
    """
    header, size = _make_header({name: list(tensor.shape) for name, tensor in tensors.items()})
    file_hash = hashlib.sha256(header)
    hashes = dict[str, str]()
    # A thread hashes the tensor while this one writes and hashes the file: both release the GIL.
    with open(path, "wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(header)
        for name, tensor in tensors.items():
            data = tensor.reshape(-1).view(np.uint8).data
            tensor_hash = pool.submit(hashlib.sha256, data)
            for at in range(0, len(data), _CHUNK):
                chunk = data[at : at + _CHUNK]
                file.write(chunk)
                file_hash.update(chunk)
            hashes[name] = tensor_hash.result().hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(bytes=size, sha256=file_hash.hexdigest()), hashes


def _make_header(shapes: Mapping[str, list[int]]) -> tuple[bytes, int]:
    """Return the header of a safetensors file of fp32 tensors, and the size of the file."""
    header = dict[str, Any]()
    offset = 0
    for name, shape in shapes.items():
        offsets = [offset, offset := offset + 4 * math.prod(shape)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + offset


def read_tensor(path: Path, name: str, target: Floats, box: tuple[slice, ...]) -> None:
    """Read a box of a tensor of a safetensors file into `target`, which has the box's shape.

    A box of whole rows is read directly into `target`. For any other box, whole rows are read in
    chunks and their columns copied. Nothing is mapped: an unreadable page would kill the process.

    Raises:
        OSError, ValueError, KeyError: the file cannot be read, or differs from the manifest.
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
        rows_per_read = max(1, _CHUNK // row)
        columns = (slice(None), *box[1:])
        for first in range(0, len(target), rows_per_read):
            part = target[first : first + rows_per_read]
            rows = np.empty((len(part), *shape[1:]), np.float32)
            _read_into(file, rows, name)
            part[...] = rows[columns]


def _find_tensor(file: FileIO, name: str) -> tuple[list[int], int]:
    """Return the shape and byte offset of an fp32 tensor, from the header of a safetensors file.

    Raises:
        OSError, ValueError: the file cannot be read, has no valid header, or lacks the tensor.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, _LONGEST_HEADER):
        raise ValueError(f"it gives its header {length} bytes, but the file has {size}")
    header = files.parse_json(file.read(length))
    entry = header.get(name) if isinstance(header, dict) else None
    if not isinstance(entry, dict):
        raise ValueError(f"its header does not contain {name}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _are_counts(shape) or not _are_counts(offsets) or (dtype, len(offsets)) != ("F32", 2):
        raise ValueError(f"{name} is {dtype!s:.20} of shape {shape!s:.40}, not F32")
    start, stop = (8 + length + offset for offset in offsets)
    if stop - start != 4 * math.prod(shape) or stop > size:
        raise ValueError(
            f"{name} of shape {shape!s:.40} takes bytes {start} to {stop} of a file of {size}"
        )
    return shape, start


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    integers = isinstance(value, list) and all(type(item) is int for item in value)
    return integers and all(0 <= item < 1 << 60 for item in value)


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
        CheckpointError: it is missing, unreadable, not a checkpoint's, or changed.
        OtherVersion: it is intact, but was written by a MegaLite with another checkpoint format.
    """
    path = folder / MANIFEST
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    kind = content.get("format") if isinstance(content, dict) else type(content).__name__
    try:
        intact = isinstance(content, dict) and content.pop("checksum", None) == _checksum(content)
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read: it is nested too deeply") from None
    if kind != FORMAT and not (intact and str(kind).startswith(_FORMAT_PREFIX)):
        raise CheckpointError(f"{path}: got format {kind!r}, this version reads {FORMAT!r}")
    if not intact:
        raise CheckpointError(f"{path} was changed or damaged since it was written (checksum)")
    try:
        manifest = CheckpointManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise OtherVersion(
            f"{path} is intact, but MegaLite {__version__} does not read it: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}; use {_version_of(content)}, "
            "which wrote it"
        ) from None
    if (foreign := _foreign_file(manifest)) is not None:
        fault = f"{foreign!r:.80}, which is not a file of this checkpoint"
        raise CheckpointError(f"{path} names the file {fault}; use another checkpoint")
    if _STEP_NAME.fullmatch(folder.name) and step_of(folder) != manifest.step:
        raise CheckpointError(
            f"{folder} contains step {manifest.step}: it was renamed; rename it to "
            f"{folder_name(manifest.step)}"
        )
    return manifest


def _foreign_file(manifest: CheckpointManifest) -> str | None:
    """Return the first file outside the folder, or a tensor's file that is not listed."""
    for name in manifest.files:
        if not files.is_inner_path(name):
            return name
    for tensor in manifest.tensors.values():
        for state in tensor.states.values():
            if state.file not in manifest.files:
                return state.file
    return None


def _version_of(content: Mapping[str, Any]) -> str:
    versions = content.get("versions")
    name = versions.get("megalite") if isinstance(versions, dict) else None
    return f"MegaLite {name or 'of another version'}"


def published(root: Path) -> list[Path]:
    """Return the published checkpoints in `root`, newest first, damaged ones included."""
    if not root.is_dir():
        return []
    folders = [p for p in root.iterdir() if _STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def best(folders: Iterable[Path]) -> Path | None:
    """Return the checkpoint of the lowest validation loss, the earliest if several have it.

    Checkpoints without a validation loss or a readable manifest are ignored.
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
    """Return the step of a published checkpoint, from its name."""
    return int(folder.name.removeprefix("step_"))


def files_of_rank(manifest: CheckpointManifest, rank: int, ranks: int) -> set[str]:
    """Return the files that a rank checks: all ranks read about equally many bytes."""
    loads = [0] * ranks
    mine = set()
    for name, entry in sorted(manifest.files.items(), key=lambda item: -item[1].bytes):
        least = loads.index(min(loads))
        loads[least] += entry.bytes
        if least == rank:
            mine.add(name)
    return mine


def find_damage(
    folder: Path,
    manifest: CheckpointManifest,
    names: Iterable[str] | None = None,
    *,
    threads: int = 1,
    tensors: bool = True,
) -> list[str]:
    """Return the faults of files: missing, wrong size, or wrong hash.

    Args:
        names: the files to check. None means all.
        threads: number of files to hash in parallel.
        tensors: if false, check only the headers of files with tensors. For a caller that compares
            the hashes of the tensors itself.
    """
    to_check = sorted(manifest.files if names is None else names)
    headers = dict[str, dict[str, list[int]]]()
    if not tensors:
        for name, tensor in manifest.tensors.items():
            for state in tensor.states.values():
                headers.setdefault(state.file, {})[name] = tensor.shape

    def fault(name: str) -> str | None:
        return _fault(folder / name, manifest.files[name], headers.get(name))

    with ThreadPoolExecutor(threads) as pool:
        return [text for text in pool.map(fault, to_check) if text is not None]


def _fault(path: Path, entry: FileEntry, shapes: Mapping[str, list[int]] | None) -> str | None:
    """Return the fault of a file. If `shapes` is given, compare its header instead of its hash."""
    try:
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != entry.bytes:
            return f"{path}: {entry.bytes} bytes were written, got {size}"
        if shapes is not None:
            if not _has_header(path, shapes):
                return f"{path}: its header is not the one that was written"
        elif files.sha256_file(path) != entry.sha256:
            return f"{path}: its bytes are not those that were written (sha256)"
    except OSError as error:  # an exception on one rank would leave the others waiting
        return f"{path} cannot be read: {error}"
    return None


def _has_header(path: Path, shapes: Mapping[str, list[int]]) -> bool:
    """Return whether a file has the header of exactly these tensors, in any order."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            return False
        text = file.read(length)
    try:
        names = list(files.parse_json(text))
        header, _ = _make_header({name: shapes[name] for name in names})
    except (ValueError, KeyError, TypeError):
        return False
    return len(names) == len(shapes) and header[8:] == text and len(text) == length


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
