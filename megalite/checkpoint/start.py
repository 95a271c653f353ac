"""Starting points of a run: a checkpoint, or a Hugging Face model folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megalite import files
from megalite.checkpoint.huggingface import HuggingFaceFolder, is_huggingface
from megalite.checkpoint.load import open_checkpoint
from megalite.config import explain_redacted, redacted_keys, restore_redacted
from megalite.errors import CheckpointError, CommandError
from megalite.formats import checkpoint as disk
from megalite.parallel import Grid

_SET_BY_FINETUNING = ("num_labels", "classifier_pooling", "adapter")


def describe_start(path: Path) -> tuple[dict[str, Any], Path]:
    """Return the model section and the tokenizer's folder of the checkpoint or model at `path`.

    Raises:
        CommandError: there is no model.
        CheckpointError: the model is damaged.
    """
    if is_huggingface(path):
        source = HuggingFaceFolder(path)
        return source.section.model_dump(mode="json", exclude_unset=True), source.path
    folder, _ = open_checkpoint(path, weights_only=True)
    return _model_section(folder), folder / "tokenizer"


def describe_run(
    folder: Path, stated: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Path] | None:
    """Return the model section and the tokenizer's folder of a run's newest readable checkpoint.

    Args:
        folder: the run folder.
        stated: the model section of the run file. It supplies the values that an earlier version
            of MegaLite redacted in the checkpoint.
    Returns:
        None if no checkpoint of the run can be read.
    Raises:
        CommandError: `stated` lacks a redacted value.
    """
    for checkpoint in disk.published(folder / "checkpoints"):
        try:
            return _model_section(checkpoint, stated), checkpoint / "tokenizer"
        except CheckpointError:
            continue  # damaged; the start will set it aside
    return None


def require_head(path: Path) -> None:
    """Check that a model has a language-model head. Only Hugging Face folders may lack it.

    Raises:
        CommandError: as `HuggingFaceFolder.require_head`.
    """
    if is_huggingface(path):
        HuggingFaceFolder(path).require_head()


def find_base(folder: Path) -> str:
    """Return the model that a checkpoint's run started from, for PEFT's `base_model_name_or_path`.

    Args:
        folder: a checkpoint in its run folder.
    Returns:
        a name on the hub, or the absolute path of a folder; "" if the run has no record of it.
    """
    name = ""
    with suppress(OSError, IndexError):
        for row in files.each_row(folder.resolve().parents[1] / "metrics.jsonl"):
            if row is not None and row.get("kind") == "event" and row.get("name") == "start":
                name = str(row.get("init_name") or row.get("init_from") or "")
        if name and Path(name).is_dir():
            return str(Path(name).resolve())
    return name


def _model_section(folder: Path, stated: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the model section of a checkpoint's run file, without the keys of fine-tuning.

    Args:
        stated: as in `describe_run`.
    Raises:
        CheckpointError: the run file cannot be read.
        CommandError: `stated` lacks a redacted value.
    """
    path = folder / "config.json"
    try:
        model = files.read_object(path).get("model")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(model, dict):
        raise CheckpointError(f"{path} has no model section; use another checkpoint")
    restore_redacted({"model": model}, {"model": stated or {}})
    if missing := redacted_keys({"model": model}):
        raise CommandError(f"{path}: {explain_redacted(missing)}")
    return {key: model[key] for key in model if key not in _SET_BY_FINETUNING}


def open_model_folder(path: Path, grid: Grid) -> HuggingFaceFolder | None:
    """Open the model folder of `--init-from` on every rank; a collective.

    Returns:
        the folder, or None if `path` is not a model folder on any host.
    Raises:
        CommandError: on every rank, if a host cannot use its folder, or if hosts have different
            commits of a model from the hub.
    """
    if not any(grid.all_gather_objects(is_huggingface(path))):
        return None
    folder: HuggingFaceFolder | None = None
    fault: CommandError | CheckpointError | None = None
    try:
        folder = HuggingFaceFolder(path)
    except (CommandError, CheckpointError) as error:
        fault = error
    results = grid.all_gather_objects((folder.path.name if folder else "", fault))
    if faults := [fault for _, fault in results if fault is not None]:
        raise faults[0]
    assert folder is not None
    commits = sorted({str(name) for name, _ in results})
    if folder.path.parent.name == "snapshots" and len(commits) > 1:
        raise CommandError(
            f"--init-from: the hosts have different commits, {', '.join(commits)}: name one, as "
            "ORG/NAME@COMMIT"
        )
    return folder
