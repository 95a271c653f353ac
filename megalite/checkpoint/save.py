"""Saves: every rank writes its files to a staging folder, and one rename publishes the folder."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megalite import __version__, arch, files
from megalite.checkpoint.lease import Lease
from megalite.checkpoint.owners import owned_parameters, read_canonical
from megalite.checkpoint.progress import Progress
from megalite.checkpoint.retention import publish_or_replace
from megalite.checkpoint.write import CheckpointWriter, Snapshot, attempt
from megalite.config import RunConfig
from megalite.engine import WEIGHT, Engine
from megalite.errors import CheckpointError, MegaLiteError, NoSpace, Superseded
from megalite.formats import checkpoint as disk
from megalite.log import logger
from megalite.parallel import Grid
from megalite.plan.optimizer import state_names


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of a checkpoint's tensors. Its other files are small."""
    rows = arch.parameters(config.model)
    return 4 * sum(row.elements * (1 + len(state_names(config, row))) for row in rows)


class Saver:
    """Saver of one run's checkpoints, at most one at a time.

    `begin` gathers the tensors and passes them to a thread that writes them. `finish` publishes if
    all ranks succeeded. Both are collectives; the caller may train between them.

    Args:
        root: the run's `checkpoints` folder, visible to every rank.
        tokenizer: folder of the tokenizer's files, which each checkpoint gets a copy of.
        lease: rank 0's right to publish. None on the other ranks.
        deepspeed: the defaults of the installed DeepSpeed, for the manifest.
        notes: function that returns further files as JSON values by name, called by `begin`.
    """

    def __init__(
        self,
        engine: Engine,
        config: RunConfig,
        *,
        grid: Grid,
        root: Path,
        data_fingerprint: str,
        tokenizer: Path,
        tokenizer_sha256: str,
        lease: Lease | None,
        deepspeed: Mapping[str, Any] | None = None,
        notes: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._notes = notes
        self._engine, self._config, self._grid = engine, config, grid
        self._root, self._tokenizer, self._lease = root, tokenizer, lease
        self._facts = {
            "data_fingerprint": data_fingerprint,
            "tokenizer_sha256": tokenizer_sha256,
            "deepspeed": dict(deepspeed or {}),
        }
        self._nonce = grid.all_gather_objects(secrets.token_hex(4))[0]
        self._bytes = checkpoint_bytes(config)
        self._writer: CheckpointWriter | None = None
        self._draft: _Draft | None = None
        self._snapshot: Snapshot = {}
        self.seconds = 0.0  # duration of the last save on this rank, without waiting for others
        self.begun = 0  # number of saves

    @property
    def under_way(self) -> Progress | None:
        """The progress that is being saved; None if no save is under way."""
        return self._draft.progress if self._draft else None

    @property
    def written(self) -> int:
        """The number of begun saves of which this rank's files are on disk."""
        return self.begun - (self._writer is not None and not self._writer.done)

    def begin(self, progress: Progress, *, snapshot: bool) -> None:
        """Gather a checkpoint and begin to write it; a collective of all ranks.

        Args:
            snapshot: If true, copy all tensors, so that training can continue at once. If false,
                training must wait for `finish`.
        Raises:
            NoSpace, CheckpointError: on every rank. Nothing was written.
            Superseded: a newer start of the run owns the folder.
        """
        assert self._draft is None, "a save is under way"
        engine, config, grid, root = self._engine, self._config, self._grid, self._root
        # An older start that still runs has another nonce, and so another folder.
        staging = root / f".staging_{progress.step:08d}_{self._nonce}"
        lease = self._lease
        began = time.monotonic()
        fault = None
        if grid.rank == 0:
            needed = self._bytes
            fault = attempt(lambda: _prepare(root, staging, lease, needed))
        self._agree(fault, None)
        self.begun += 1
        self._writer = writer = CheckpointWriter(
            staging, grid.rank, self._snapshot if snapshot else None
        )
        for owner in owned_parameters(engine, config.model, grid):
            for state in (WEIGHT, *state_names(config, owner.row)):
                writer.add(state, read_canonical(engine, owner, state, grid))
        writer.close()
        self._draft = _Draft(
            config=config,
            progress=progress,
            staging=staging,
            engine_progress=engine.progress(),
            facts=self._facts,
            notes=self._notes(),
        )
        self.seconds = time.monotonic() - began

    def finish(self) -> Path:
        """Wait for all ranks' files and publish the checkpoint; a collective of all ranks.

        Returns:
            the published folder.
        Raises:
            NoSpace: on every rank, if the disk or a quota was full for any rank.
            CheckpointError: on every rank, if any rank failed otherwise. Nothing is published.
            Superseded: a newer start of the run owns the folder.
        """
        assert self._writer is not None
        assert self._draft is not None
        writer, draft, grid = self._writer, self._draft, self._grid
        self._draft = None
        final = self._root / disk.folder_name(draft.progress.step)
        writer.wait()
        began = time.monotonic()
        self._agree(writer.fault, draft.staging)
        written = grid.all_gather_objects((writer.files, writer.tensors))
        fault = None
        if grid.rank == 0:
            fault = attempt(lambda: draft.publish(final, self._tokenizer, written, self._lease))
        self._agree(fault, draft.staging)
        self.seconds += writer.seconds + time.monotonic() - began
        return final

    def record_score(self, progress: Progress) -> None:
        """Write a validation loss that was measured after the save into the published checkpoint.

        Rank 0 writes. If it fails, the checkpoint cannot become the best, and the run continues.
        """
        folder = self._root / disk.folder_name(progress.step)
        if self._grid.rank != 0 or progress.valid_loss is None or not folder.is_dir():
            return
        try:
            if self._lease is not None:
                self._lease.check()
            disk.record_valid_loss(folder, progress.valid_loss)
        except Superseded as error:  # only rank 0 is here; the next `_agree` ends all ranks
            logger.debug("%s", error)
        except (OSError, CheckpointError) as error:
            logger.warning("%s: its validation loss cannot be recorded: %s", folder, error)

    def check_lease(self) -> None:
        """Raise Superseded on every rank if a newer start owns the folder; a collective."""
        self._agree(None, None)

    def _agree(self, fault: MegaLiteError | None, staging: Path | None) -> None:
        """Raise the same error on every rank if any rank has a fault."""
        grid, lease = self._grid, self._lease
        if lease is not None:  # a newer start would have removed the staging folder
            fault = attempt(lease.check) or fault
        if grid.all_true(fault is None):
            return
        faults: list[MegaLiteError] = [
            item for item in grid.all_gather_objects(fault) if item is not None
        ]
        if grid.rank == 0 and staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        grid.barrier()
        logger.debug("save abandoned: %s", faults[0])
        if isinstance(faults[0], Superseded):  # rank 0 alone has the lease, and comes first
            raise faults[0]
        full = [item for item in faults if isinstance(item, NoSpace)]
        raise type((full or faults)[0])(f"the checkpoint was not saved: {(full or faults)[0]}")


@dataclass(frozen=True)
class _Draft:
    """Contents that rank 0 adds to the ranks' files to complete a checkpoint."""

    config: RunConfig
    progress: Progress
    staging: Path
    engine_progress: dict[str, Any]
    facts: dict[str, Any]
    notes: Mapping[str, Any]

    def publish(
        self, final: Path, tokenizer: Path, written: Iterable[Any], lease: Lease | None
    ) -> None:
        staging = self.staging
        entries: dict[str, Any] = {}
        states: dict[str, dict[str, Any]] = {}
        for rank_files, rank_tensors in written:
            entries.update(rank_files)
            for tensor, entry in rank_tensors.items():
                states.setdefault(tensor, {}).update(entry)
        files.write_json(staging / "config.json", self.config.model_dump(mode="json"))
        for name, value in self.notes.items():
            files.write_json(staging / name, value)
        shutil.copytree(tokenizer, staging / "tokenizer", ignore=_links)
        for path in sorted(staging.rglob("*")):
            name = path.relative_to(staging).as_posix()
            if path.is_file() and name not in entries:
                files.sync_file(path)
                entries[name] = {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
        tensors = arch.tensors(self.config.model)
        manifest = disk.CheckpointManifest(
            format="megalite-checkpoint-1",
            step=self.progress.step,
            samples=self.progress.samples,
            tokens=self.progress.tokens,
            valid_loss=self.progress.valid_loss,
            progress=self.engine_progress,
            optimizer=self.config.optimizer.model_dump(mode="json"),
            **self.facts,
            versions={
                "megalite": __version__,
                "torch": version("torch"),
                "deepspeed": version("deepspeed"),
            },
            tensors={
                name: disk.TensorEntry(shape=list(tensor.shape), states=states[name])
                for name, tensor in tensors.items()
            },
            files={name: disk.FileEntry(**entry) for name, entry in entries.items()},
        )
        disk.write_manifest(staging, manifest)
        if lease is not None:
            lease.check()
        publish_or_replace(staging, final)


def _links(folder: str, names: list[str]) -> list[str]:
    """Return the names that are links. A checkpoint contains only regular files."""
    return [name for name in names if Path(folder, name).is_symlink()]


def _prepare(root: Path, staging: Path, lease: Lease | None, needed: int) -> None:
    if lease is not None:
        lease.check()
    root.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(root).free):
        raise NoSpace(
            f"it needs {needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} are free in {root}; make "
            "room, or lower checkpoint.keep"
        )
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
