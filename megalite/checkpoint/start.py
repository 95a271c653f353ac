"""What a run can start from: a checkpoint, or a model folder of Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalite import files
from megalite.checkpoint.huggingface import HuggingFaceFolder, is_huggingface
from megalite.checkpoint.load import open_checkpoint
from megalite.config import explain_redacted, redacted_keys
from megalite.errors import CheckpointError, CommandError
from megalite.formats import checkpoint as disk

_FILLED_IN = ("num_labels", "classifier_pooling", "adapter")


def describe_start(path: Path) -> tuple[dict[str, Any], Path]:
    """The model section of what lies at `path`, and where its tokenizer does.

    Raises:
        CommandError: no model there.
        CheckpointError: a damaged one.
    """
    if is_huggingface(path):
        return HuggingFaceFolder(path).section.model_dump(mode="json", exclude_unset=True), path
    folder, _ = open_checkpoint(path, weights_only=True)
    return _model_section(folder), folder / "tokenizer"


def describe_run(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The same of a run that has checkpoints, which goes on without what it was started from."""
    for found in disk.published(folder / "checkpoints"):
        try:
            return _model_section(found), found / "tokenizer"
        except CheckpointError:
            continue  # damaged: the start will set it aside
    return None


def _model_section(folder: Path) -> dict[str, Any]:
    """The model section of a checkpoint's run file, without what fine-tuning fills in.

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
    if lost := redacted_keys({"model": model}):
        raise CommandError(f"{path}: {explain_redacted(lost)}")
    return {key: model[key] for key in model if key not in _FILLED_IN}
