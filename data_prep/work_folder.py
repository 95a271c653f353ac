"""The folder through which workers and ranks cooperate without sending messages.

    .NAME.work/                    next to the output NAME, which appears when all is done
        lock                       locked by the leading process; contains its name
        current.json               the current run, and its request
        parts/KEY_000012.part      the encoded documents of one part; outlives the run
        run-NONCE/                 one run: plan.json, join.json, error.json, beat
            claims/ done/          a file for each part that is claimed, or done
            ends/                  a file for each stream with its last part
            workers/               a file for each worker with its progress
            shards/ valid/         become NAME and the folder of held-out documents
        publishing.json            the run whose complete folders are being renamed

The name of a part's file is a hash of everything that decides its content. So a later run with the
same request uses the parts of an earlier one. Files appear by a rename or are created exclusively.
A part that is done twice has the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.output import remove_created_parents
from megalite import env
from megalite.errors import CommandError, DataError, MegaLiteError, UserError
from megalite.files import parse_json, publish, repeating, sync_directory, sync_file
from megalite.formats.manifest import MANIFEST_NAME
from megalite.log import logger

_WORTH_KEEPING = 60.0  # seconds of work after which parts are kept despite a user error
_SILENCE = 60.0  # seconds without a heartbeat after which the leader counts as dead
_BEAT = 1.0  # seconds between heartbeats


class PrepRun:
    """The files of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = folder / "plan.json"
        self.shard_plans = folder / "join.json"
        self.shards = folder / "shards"
        self.dropped = folder / "dropped"
        self.valid = folder / "valid"
        self._claims = folder / "claims"
        self._done = folder / "done"
        self._workers = folder / "workers"
        self._error = folder / "error.json"
        self._ends = folder / "ends"
        self._beat = folder / "beat"
        self._parts = folder.parent / "parts"
        self._last_beat = None
        self._last_change = time.monotonic()

    def create(self) -> None:
        """Create the run's folders."""
        for path in (self._claims, self._done, self._ends, self._workers):
            path.mkdir(parents=True)
        self.shards.mkdir()
        self.valid.mkdir()

    def claim(self, name: str) -> bool:
        """Claim a part or shard; return whether this caller is the first to do so."""
        try:
            (self._claims / name).touch(0o644, exist_ok=False)
        except FileExistsError:
            return False
        return True

    def finish(self, name: str) -> None:
        """Record that a part or shard is done."""
        (self._done / name).touch(0o644)

    def part(self, name: str) -> Path:
        """Return the file of an encoded part, which outlives the run."""
        return self._parts / f"{name}.part"

    def end(self, key: str, last: int) -> None:
        """Record the last part of a stream. The first record stays."""
        write(self._ends / key, last, first=True)

    def last(self, key: str) -> int | None:
        """Return the last part of a stream, or None if no worker has reached its end."""
        part: int | None = read(self._ends / key)
        return part

    def done(self) -> set[str]:
        """Return the names of all parts and shards that are done."""
        return set(os.listdir(self._done))

    def report(self, worker: str, progress: dict[str, Any]) -> None:
        """Write a worker's progress."""
        write(self._workers / worker, progress)

    def reports(self) -> list[dict[str, Any]]:
        """Return the progress of all workers."""
        files = (path for path in self._workers.iterdir() if not path.name.startswith("."))
        return [report for path in files if (report := read(path)) is not None]

    def fail(self, error: MegaLiteError | OSError) -> None:
        """Stop all ranks and workers with an error. The first error counts."""
        if isinstance(error, OSError):
            error = MegaLiteError(f"the disk refused: {error}")
        with suppress(OSError):  # the run has ended, or the disk is full
            report = {"code": error.exit_code, "message": str(error), "by": who_am_i()}
            write(self._error, report, first=True)

    def check(self) -> None:
        """Raise the error that stopped the run, or an error if its leader has died."""
        if (report := read(self._error)) is not None:
            by = "" if report["by"].startswith(_host()) else f"{report['by']}: "
            kind = DataError if report["code"] == DataError.exit_code else MegaLiteError
            raise kind(by + report["message"])
        if (beat := read(self._beat)) != self._last_beat:
            self._last_beat = beat
            self._last_change = time.monotonic()
        elif time.monotonic() - self._last_change > _SILENCE:
            raise MegaLiteError(
                f"rank 0 gave no sign of life in {self.folder} for {_SILENCE:.0f} s; what is done "
                "is kept: start the command again"
            )

    def beat(self) -> None:
        """Write the leader's heartbeat."""
        write(self._beat, time.time())

    def beating(self) -> AbstractContextManager[None]:
        """Write the heartbeat every second from a thread."""
        return repeating(self.beat, every=_BEAT)


class WorkFolder:
    """The work folder of an output.

    Args:
        output: the future output folder.
        request: the options that decide the output, as JSON. Runs of another request are ignored.
        launch: identifier of the launch. Ranks follow only the rank 0 of their launch.
        valid_output: the future folder of held-out documents.
    """

    def __init__(
        self,
        output: Path,
        request: dict[str, Any],
        launch: str = "",
        valid_output: Path | None = None,
    ) -> None:
        self.output = output
        self._request = json.loads(json.dumps(request))
        self._launch = launch
        self._valid_output = valid_output
        self.path = output.with_name(f".{output.name}.work")
        self.parts = self.path / "parts"
        self._current = self.path / "current.json"
        self._publishing = self.path / "publishing.json"

    @contextmanager
    def lead(self) -> Iterator[PrepRun]:
        """Create a run that this process leads. Other ranks join it after `start`.

        If the run fails, its parts are kept for the next run, unless a user error ended it early.

        Raises:
            CommandError: another process leads a run for this output.
        """
        with remove_created_parents(self.path):
            self.parts.mkdir(parents=True, exist_ok=True)
            lock = _lock(self.path / "lock", self.output)
            began = time.monotonic()
            before = self._count()
            try:
                self._current.unlink(missing_ok=True)
                self._publishing.unlink(missing_ok=True)
                for old in self.path.glob("run-*"):
                    shutil.rmtree(old, ignore_errors=True)
                run = PrepRun(self.path / f"run-{secrets.token_hex(4)}")
                run.create()
                yield run
            except BaseException as error:
                at_once = isinstance(error, UserError) and time.monotonic() - began < _WORTH_KEEPING
                self._leave(keep=bool(before) or not at_once)
                raise
            finally:
                os.close(lock)

    def start(self, run: PrepRun) -> None:
        """Let the other ranks join the run."""
        run.beat()
        current = {"run": run.folder.name, "asked": self._request, "launch": self._launch}
        write(self._current, current)

    def follow(self) -> PrepRun | None:
        """Return the run that rank 0 of this launch leads, or None."""
        current = self._current_if_same()
        if current is None or current["launch"] != self._launch:
            return None
        return PrepRun(self.path / current["run"])

    def publish(self, run: PrepRun) -> None:
        """Rename the complete folders to the outputs, the training shards last.

        So the training folder shows that both exist. If the process is killed between the renames,
        the next run's `finish_publishing` does the rest.
        """
        if self._valid_output is not None:
            write(self._publishing, {"run": run.folder.name, "asked": self._request})
            sync_file(self._publishing)
            sync_directory(self.path)
        self._rename(run)

    def finish_publishing(self) -> None:
        """Complete the renames of a run that was killed in `publish`.

        Raises:
            CommandError: that run is still running.
        """
        record = read(self._publishing)
        if record is None or record["asked"] != self._request:
            return
        lock = _lock(self.path / "lock", self.output)
        try:
            self._rename(PrepRun(self.path / record["run"]))
        finally:
            os.close(lock)

    def _rename(self, run: PrepRun) -> None:
        for staging, final in ((run.valid, self._valid_output), (run.shards, self.output)):
            if final is not None and staging.exists():
                final.parent.mkdir(parents=True, exist_ok=True)
                publish(staging, final)

    def was_published(self) -> bool:
        """Return whether a run of this request was killed after it published its output."""
        return (self.output / MANIFEST_NAME).exists() and self._current_if_same() is not None

    def _current_if_same(self) -> Any:
        current = read(self._current)
        return current if current is not None and current["asked"] == self._request else None

    def clear(self) -> None:
        """Remove the work folder, `current.json` last."""
        shutil.rmtree(self.parts, ignore_errors=True)
        for run in self.path.glob("run-*"):
            shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _count(self) -> int:
        return sum(name.endswith(".part") for name in os.listdir(self.parts))

    def _leave(self, *, keep: bool) -> None:
        count = self._count()
        if not (keep and count):
            self.clear()
            return
        logger.warning(
            "%d parts are done and kept in %s; run the same command to continue, or remove the "
            "folder",
            count,
            self.path,
        )


def write(path: Path, value: Any, *, first: bool = False) -> None:
    """Write JSON by a rename. If `first`, keep an existing file."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    partial.write_text(json.dumps(value))
    with suppress(FileExistsError):
        (os.link if first else os.replace)(partial, path)
    partial.unlink(missing_ok=True)


def read(path: Path) -> Any:
    """Return the JSON that `write` wrote, or None if there is none."""
    try:
        return parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def who_am_i() -> str:
    """Return the host, process and job of this process, for messages."""
    job = env.job().id
    return f"{_host()}, process {os.getpid()}" + (f", job {job}" if job else "")


def _host() -> str:
    return f"host {socket.gethostname()}"


def _lock(path: Path, output: Path) -> int:
    """Take a file lock, which the system releases when this process ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = read(path) or {}
        os.close(handle)
        raise CommandError(
            f"--output {output} is being written since {holder.get('since', 'just now')} by "
            f"{holder.get('who', 'another process')}; wait for it, or stop it"
        ) from None
    except OSError as error:
        logger.warning(
            "%s: this file system has no locks (%s); make sure that no other command writes %s",
            path,
            error.strerror,
            output,
        )
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"who": who_am_i(), "since": since}).encode()
    os.ftruncate(handle, 0)
    os.pwrite(handle, text, 0)
    return handle
