"""Differences between a run's model and the one it starts from: allowed ones, refused ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalite.config import ModelConfig
from megalite.errors import CommandError
from megalite.log import logger

# Values that matter for training only.
_TRAINING_ONLY = {"initializer_range", "hidden_dropout", "attention_dropout", "classifier_pooling"}
# Values that change the model's output, but no tensor's shape.
_CHANGEABLE = (
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "norm_eps",
    "sliding_window",
    "layer_types",
)


def compare_models(
    model: ModelConfig, theirs: ModelConfig, source: Path, *, adapters: bool = False
) -> dict[str, Any]:
    """Return the keys of the model section that a run changes from its start, and log them.

    Context length, RoPE, the norms' epsilon and sliding windows may change, because no tensor
    depends on them. The vocabulary may grow.

    Args:
        model: the run's model, without labels and adapters.
        theirs: the model in `source`, without labels and adapters.
        adapters: whether the run trains only adapters. New rows of the vocabulary then stay as
            they start.
    Returns:
        {"model.KEY": {"before": value, "after": value}}.
    Raises:
        CommandError: any other difference. The message has the model section to paste.
    """
    ours, other = (m.model_dump(mode="json", exclude=_TRAINING_ONLY) for m in (model, theirs))
    changed = [key for key in ours if ours[key] != other[key]]
    if theirs.position_embedding == "learned" and "max_position_embeddings" in changed:
        _refuse_positions(model, theirs, source)
    allowed = {*_CHANGEABLE}
    if model.vocab_size > theirs.vocab_size:
        allowed.add("vocab_size")
    if refused := [key for key in changed if key not in allowed]:
        faults = "; ".join(f"model.{k} is {ours[k]!r}, there {other[k]!r}" for k in refused)
        section = theirs.model_dump(mode="json", exclude_unset=True)
        hint = ""
        if "vocab_size" in refused:
            hint = " (a vocabulary can only grow)"
        raise CommandError(
            f"{source} holds another model: {faults}{hint}; use its model section:\n"
            f'"model": {json.dumps(section)}'
        )
    changes = {f"model.{key}": {"before": other[key], "after": ours[key]} for key in changed}
    for key, change in changes.items():
        if key != "model.vocab_size":
            before, after = (json.dumps(change[name]) for name in ("before", "after"))
            logger.info("%s: %s in %s, %s in this run", key, before, source, after)
    if "model.vocab_size" in changes:
        logger.info(
            "model.vocab_size: %d in %s, %d in this run: each new row of the embedding and of the "
            "head starts as the mean of the old rows",
            *(theirs.vocab_size, source, model.vocab_size),
        )
        if adapters:
            logger.warning(
                "finetune.adapter does not train the embedding: the rows of new tokens keep that "
                "mean; to train them, remove finetune.adapter"
            )
    if "model.max_position_embeddings" in changes:
        _warn_of_positions(model, theirs)
    return changes


def _refuse_positions(model: ModelConfig, theirs: ModelConfig, source: Path) -> None:
    raise CommandError(
        f"model.max_position_embeddings is {model.max_position_embeddings}, but {source} holds a "
        f"learned table of {theirs.max_position_embeddings} positions, which has no other rows: "
        f"set it to {theirs.max_position_embeddings}, and finetune.data.max_length or "
        "data.sequence_length to at most as much"
    )


def _warn_of_positions(model: ModelConfig, theirs: ModelConfig) -> None:
    """Warn of positions that neither the training nor a scaled RoPE covers."""
    if model.position_embedding not in ("rope", "sinusoidal"):
        return
    trained, wanted = theirs.max_position_embeddings, model.max_position_embeddings
    scaling = model.rope_scaling
    reach = float(trained)
    if scaling is not None and scaling != theirs.rope_scaling:
        before = theirs.rope_scaling.factor if theirs.rope_scaling else 1.0
        reach = trained * scaling.factor / before
        if scaling.original_max_position_embeddings:
            reach = scaling.original_max_position_embeddings * scaling.factor
    if wanted > reach:
        factor = -(-wanted // trained)
        stretch = json.dumps({"rope_type": "linear", "factor": factor})
        remedy = f"set model.rope_scaling, such as {stretch}, or train on such lengths"
        logger.warning(
            "model.max_position_embeddings %d: the model was trained on positions up to %d%s; %s",
            *(wanted, trained, "" if reach == trained else f", scaled to {reach:.0f}"),
            remedy if model.position_embedding == "rope" else "train on such lengths",
        )
