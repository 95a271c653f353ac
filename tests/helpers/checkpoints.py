"""Published checkpoints, with or without tensors, and the resume points that a start finds."""

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
    """Return a fingerprint of the data that does not depend on sequence length and seed."""
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
    """Write a checkpoint without tensors, and return its folder.

    Args:
        without: dotted key that config.json lacks.
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
    """Update a manifest to the changed files of its folder, and set fields in it."""
    content = files.read_json(folder / disk.MANIFEST) | fields
    del content["checksum"]
    for name, entry in content["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size}
        entry |= {"sha256": files.sha256_file(folder / name)}
    text = json.dumps(content, sort_keys=True).encode()
    files.write_json(
        folder / disk.MANIFEST, content | {"checksum": hashlib.sha256(text).hexdigest()}
    )


def damage_weights(folder: Path) -> None:
    """Change bytes of a checkpoint from `publish`."""
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
    """Call `find_resume_point` with the fingerprints of `publish`."""
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


def changed_config(**sections: Any) -> RunConfig:
    """Return `run_config()` with some keys of its sections changed."""
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
    """Publish a checkpoint below `root`, by default of step 3, with a tokenizer of two files."""
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
