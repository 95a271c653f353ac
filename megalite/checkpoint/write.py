"""Writer of a rank's files of a checkpoint, in a thread."""

from __future__ import annotations

import errno
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.engine import WEIGHT
from megalite.errors import CheckpointError, MegaLiteError, NoSpace, Superseded
from megalite.formats import checkpoint as disk

_FILE_BYTES = 1 << 30  # a file is written as soon as its tensors have this size
_MAX_QUEUED = 2  # files, without a snapshot
_NICENESS = 5  # gets about a quarter of a core that training also uses
_FULL = (errno.ENOSPC, errno.EDQUOT)

Snapshot = dict[tuple[str, str], Tensor]


class CheckpointWriter:
    """Writer of tensors, in files of one state each.

    A thread writes, syncs and hashes, which releases the GIL. It stores its first fault in `fault`
    and does not raise it, because other ranks may wait in collectives.

    Args:
        snapshot: buffers by state and name to copy tensors to; missing ones are added, and later
            saves may use them again. None means no copies: the tensors must not change until
            `done`, and `add` waits for the disk.
    """

    def __init__(self, staging: Path, rank: int, snapshot: Snapshot | None) -> None:
        self._staging, self._rank, self._snapshot = staging, rank, snapshot
        self.tensors: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.fault: CheckpointError | None = None
        self.seconds = 0.0  # spent on writing
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._count = 0
        self._queue: queue.Queue[tuple[str, dict[str, Tensor]] | None] = queue.Queue(
            _MAX_QUEUED if snapshot is None else 0
        )
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether all files are on disk, or writing failed."""
        return not self._thread.is_alive()

    def add(self, state: str, tensors: dict[str, Tensor]) -> None:
        """Add tensors of one state, contiguous and on the CPU."""
        if self._snapshot is not None:
            tensors = {name: self._copy(state, name, value) for name, value in tensors.items()}
        part = self._parts.setdefault(state, {})
        part.update(tensors)
        if sum(tensor.nbytes for tensor in part.values()) >= _FILE_BYTES:
            self._queue.put((state, self._parts.pop(state)))

    def _copy(self, state: str, name: str, value: Tensor) -> Tensor:
        assert self._snapshot is not None
        if (state, name) not in self._snapshot:
            self._snapshot[state, name] = torch.empty_like(value)
        return self._snapshot[state, name].copy_(value)

    def close(self) -> None:
        """Write the remaining tensors. Call after the last `add`."""
        for state, part in self._parts.items():
            self._queue.put((state, part))
        self._parts = {}
        self._queue.put(None)

    def wait(self) -> None:
        """Wait until `done`."""
        self._thread.join()

    def _work(self) -> None:
        if self._snapshot is not None and sys.platform == "linux":
            with suppress(OSError):  # on Linux this lowers the priority of this thread alone
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (item := self._queue.get()) is not None:
            if self.fault is None and item[1]:
                began = time.monotonic()
                self._write(*item)
                self.seconds += time.monotonic() - began

    def _write(self, state: str, part: dict[str, Tensor]) -> None:
        kind = "model" if state == WEIGHT else state
        name = f"{kind}-{self._rank:05d}-{self._count:05d}.safetensors"
        self._count += 1
        path = self._staging / name
        try:
            arrays = {tensor: value.numpy() for tensor, value in part.items()}
            entry, hashes = disk.write_tensors(path, arrays)
        except Exception as error:
            self.fault = as_fault(error, f"rank {self._rank} could not write {path}: {error}")
            return
        self.files[name] = entry.model_dump()
        for tensor, sha256 in hashes.items():
            self.tensors.setdefault(tensor, {})[state] = {"file": name, "sha256": sha256}


def as_fault(error: Exception, message: str) -> CheckpointError:
    """Return a failed write as NoSpace if the disk or a quota was full, else as CheckpointError."""
    # shutil.copytree reports the errors of its files as text
    numbers = [int(digits) for digits in re.findall(r"\[Errno (\d+)\]", str(error))]
    if getattr(error, "errno", None) in _FULL or any(number in _FULL for number in numbers):
        return NoSpace(f"{message}; make room, or lower checkpoint.keep")
    return CheckpointError(message)


def attempt(action: Callable[[], object]) -> MegaLiteError | None:
    """Run an action of rank 0 and return its error, which `Saver._agree` raises on all ranks."""
    try:
        action()
    except (Superseded, NoSpace) as error:
        return error
    except Exception as error:
        return as_fault(error, f"rank 0: {error}")
    return None
