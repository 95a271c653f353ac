"""Starting points of a run: a checkpoint, or a model folder of Hugging Face's."""

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

_FILLED_IN = ("num_labels", "classifier_pooling", "adapter")


def describe_start(path: Path) -> tuple[dict[str, Any], Path]:
    """Return the model section of the source at `path`, and the folder of its tokenizer.

    Raises:
        CommandError: no model there.
        CheckpointError: a damaged one.
    """
    if is_huggingface(path):
        opened = HuggingFaceFolder(path)
        return opened.section.model_dump(mode="json", exclude_unset=True), opened.path
    folder, _ = open_checkpoint(path, weights_only=True)
    return _model_section(folder), folder / "tokenizer"


def describe_run(
    folder: Path, stated: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Path] | None:
    """Return the same for a run with checkpoints, which resumes without its start model.

    Args:
        stated: the model section of the run file. It supplies values that an earlier version's
            redaction replaced in the checkpoint.
    Returns:
        None if no checkpoint of the run can be read.
    Raises:
        CommandError: `stated` lacks a value that redaction replaced.
    """
    for found in disk.published(folder / "checkpoints"):
        try:
            return _model_section(found, stated), found / "tokenizer"
        except CheckpointError:
            continue  # damaged: the start will set it aside
    return None


def require_head(path: Path) -> None:
    """Refuse a model folder without the head that a language model needs; ours always has it.

    Raises:
        CommandError: as `HuggingFaceFolder.require_head`.
    """
    if is_huggingface(path):
        HuggingFaceFolder(path).require_head()


def find_base(folder: Path) -> str:
    """Return the name of the model that a checkpoint's run started from, as PEFT writes it.

    Args:
        folder: a step folder inside its run folder.
    Returns:
        a name of the hub, or the whole path of a folder; "" if the run's records do not say.
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
    """Return the model section of a checkpoint's run file, without what fine-tuning fills in.

    Args:
        stated: as `describe_run`.

    Raises:
        CheckpointError: it cannot be read.
        CommandError: an earlier version's redaction changed it.
    """
    path = folder / "config.json"
    try:
        model = files.read_object(path).get("model")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(model, dict):
        raise CheckpointError(f"{path} has no model section; it is not a checkpoint's")
    restore_redacted({"model": model}, {"model": stated or {}})
    if lost := redacted_keys({"model": model}):
        raise CommandError(f"{path}: {explain_redacted(lost)}")
    return {key: model[key] for key in model if key not in _FILLED_IN}


def open_model_folder(path: Path, grid: Grid) -> HuggingFaceFolder | None:
    """Open the model folder of `--init-from` on every rank; a collective.

    Returns:
        the folder, or None if no host has a model folder there.
    Raises:
        CommandError: on every rank, if a host cannot use its folder, or if hosts have different
            commits of a model from the hub.
    """
    if not any(grid.all_gather_objects(is_huggingface(path))):
        return None
    opened: HuggingFaceFolder | None = None
    fault: CommandError | CheckpointError | None = None
    try:
        opened = HuggingFaceFolder(path)
    except (CommandError, CheckpointError) as error:
        fault = error
    found = grid.all_gather_objects((opened.path.name if opened else "", fault))
    if faults := [fault for _, fault in found if fault is not None]:
        raise faults[0]
    assert opened is not None
    commits = sorted({str(name) for name, _ in found})
    if opened.path.parent.name == "snapshots" and len(commits) > 1:
        raise CommandError(
            f"--init-from: the hosts have different commits, {', '.join(commits)}: name one, as "
            "ORG/NAME@COMMIT"
        )
    return opened
