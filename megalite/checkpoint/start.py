"""What a run can start from: a checkpoint, or a model folder of Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalite import files
from megalite.checkpoint.huggingface import HuggingFaceFolder, is_huggingface
from megalite.checkpoint.load import open_checkpoint

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
    model = files.read_json(folder / "config.json")["model"]
    return {key: model[key] for key in model if key not in _FILLED_IN}, folder / "tokenizer"
