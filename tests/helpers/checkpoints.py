"""Published checkpoints, with values or without, and what a start finds in them."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from megalite import arch, files
from megalite.checkpoint import Lease, Progress, Saver
from megalite.config import RunConfig
from megalite.engine.reference import ReferenceEngine
from megalite.formats import checkpoint as disk
from megalite.parallel import Grid
from megalite.train.resume import ResumePoint, find_resume_point
from tests.helpers.models import run_config

TOKENIZER = "ab" * 32


def fingerprint(config: RunConfig, shards: str = "web") -> str:
    """Return what is read, apart from the windows and the order that the run file itself tells."""
    data = config.data
    return f"{shards} {[source.weight for source in data.train]} {data.mask_documents}"


def publish(
    root: Path,
    step: int,
    config: RunConfig,
    *,
    without: str = "",
    deepspeed: dict[str, Any] | None = None,
) -> Path:
    """Return a checkpoint without its tensors' values; `without` leaves a key out of
    config.json.
    """
    folder = root / disk.folder_name(step)
    folder.mkdir(parents=True)
    content = config.model_dump(mode="json")
    if without:
        section, key = without.split(".")
        del content[section][key]
    files.write_json(folder / "config.json", content)
    (folder / "weights").write_bytes(b"weights")
    entries = {
        name: disk.FileEntry(
            bytes=(folder / name).stat().st_size, sha256=files.sha256_file(folder / name)
        )
        for name in ("config.json", "weights")
    }
    manifest = disk.CheckpointManifest(
        format="megalite-checkpoint-1",
        step=step,
        samples=step * 4,
        tokens=step * 32,
        progress={"updates": step},
        optimizer={},
        data_fingerprint=fingerprint(config),
        tokenizer_sha256=TOKENIZER,
        versions={"deepspeed": "0.19.2"},
        deepspeed=deepspeed or {},
        tensors={
            name: disk.TensorEntry(shape=list(tensor.shape), states={})
            for name, tensor in arch.tensors(config.model).items()
        },
        files=entries,
    )
    disk.write_manifest(folder, manifest)
    return folder


def reseal(folder: Path, **fields: Any) -> None:
    """Make a changed folder whole again, as a version that writes these fields would have."""
    content = files.read_json(folder / disk.MANIFEST) | fields
    del content["checksum"]
    for name, entry in content["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size}
        entry |= {"sha256": files.sha256_file(folder / name)}
    text = json.dumps(content, sort_keys=True).encode()
    files.write_json(
        folder / disk.MANIFEST, content | {"checksum": hashlib.sha256(text).hexdigest()}
    )


def spoil(folder: Path) -> None:
    (folder / "weights").write_bytes(b"weighed")


def find(
    grid: Grid,
    root: Path,
    config: RunConfig,
    *,
    resume: str = "auto",
    init_from: str | None = None,
    allow: tuple[str, ...] = (),
    shards: str = "web",
    tokenizer: str = TOKENIZER,
    deepspeed: dict[str, Any] | None = None,
) -> ResumePoint | None:
    return find_resume_point(
        config,
        grid=grid,
        root=root,
        resume=resume,
        init_from=init_from,
        allow=allow,
        data_fingerprint=fingerprint(config, shards),
        tokenizer_sha256=tokenizer,
        deepspeed=deepspeed,
    )


def changed(**sections: Any) -> RunConfig:
    """Return the run file of `run_config()` with other values, in sections that stay whole
    otherwise.
    """
    raw = deepcopy(run_config().model_dump(mode="json"))
    for name, value in sections.items():
        if isinstance(value, dict):
            raw[name].update(value)
        else:
            raw[name] = value
    return RunConfig.model_validate(raw)


def save_checkpoint(
    engine: ReferenceEngine,
    grid: Grid,
    root: Path,
    *,
    progress: Progress | None = None,
    lease: Lease | None = None,
) -> Path:
    """Publish a checkpoint below `root`, of step 3 unless told, with a tokenizer of two files."""
    tokenizer = root.parent / "tokenizer"
    (tokenizer / "inner").mkdir(parents=True, exist_ok=True)
    for name in ("bytes.json", "inner/more.txt"):
        (tokenizer / name).write_text("{}")
    saver = Saver(
        engine,
        engine.config,
        grid=grid,
        root=root,
        data_fingerprint="data",
        tokenizer=tokenizer,
        tokenizer_sha256="ab" * 32,
        lease=lease,
    )
    saver.begin(progress or Progress(step=3, samples=12, tokens=96), snapshot=False)
    return saver.finish()
