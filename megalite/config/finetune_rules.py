"""Rules of the finetune section, and between it and other sections."""

from __future__ import annotations

from collections.abc import Iterator

from megalite.config.faults import ConfigFault, fault, show
from megalite.config.finetune import ExamplesConfig, FinetuneConfig
from megalite.config.schema import RunConfig
from megalite.config.tasks import TaskSpec, find_task, optional_keys, tasks_with_key


def finetune_faults(config: RunConfig) -> Iterator[ConfigFault]:
    """Yield the faults of a fine-tuning run."""
    tuning = config.finetune
    kind = config.model.architecture
    assert tuning is not None
    task = find_task(tuning.task)
    data = tuning.data
    if task.architectures and kind not in task.architectures:
        expected = " or ".join(map(show, task.architectures))
        yield fault(
            "finetune.task model.architecture",
            f"{show(tuning.task)} needs an architecture {expected}, got {show(kind)}; choose "
            "another task or model",
        )
    yield from _task_keys(tuning, task)
    if tuning.pooling and kind == "encoder_decoder":
        yield fault(
            "finetune.pooling", "an encoder_decoder predicts from its only target token; remove it"
        )
    if tuning.class_weights and tuning.balance_classes:
        yield fault(
            "finetune.class_weights",
            "balance_classes, which is also set, computes the weights; remove one of the two",
        )
    if tuning.metric not in (None, *task.metrics):
        yield fault(
            "finetune.metric",
            f"{show(tuning.metric)} only applies to classification; set it to loss",
        )
    if (data.prompt_column is None) != (data.response_column is None):
        yield fault(
            "finetune.data.prompt_column",
            "prompt_column and response_column belong together; set both or none",
        )
    if task.has_labels and config.parallel.sequence and kind == "encoder_decoder":
        yield fault(
            "parallel.sequence finetune.task",
            "a target of one token cannot be split over ranks; set it to false",
        )
    yield from _data(config, tuning)


def _data(config: RunConfig, tuning: FinetuneConfig) -> Iterator[ConfigFault]:
    """Yield the faults of the splits and of their lengths."""
    data = tuning.data
    yield from _splits(data)
    if tuning.early_stopping and not has_held_out(config):
        yield fault(
            "finetune.early_stopping",
            "needs a validation or a test split; set finetune.data.valid_split or valid_fraction",
        )
    if config.data.train or config.data.valid:
        yield fault(
            "data.train", "finetune.data defines the data; remove data.train and data.valid"
        )
    if config.data.sequence_length != data.max_length:
        yield fault(
            "data.sequence_length finetune.data.max_length",
            f"{config.data.sequence_length}, but finetune.data.max_length is {data.max_length}; "
            "remove it",
        )


def _task_keys(tuning: FinetuneConfig, task: TaskSpec) -> Iterator[ConfigFault]:
    """Yield keys that are set but do not apply to the task."""
    for key in optional_keys():
        *inner, last = key.split(".")
        value = getattr(tuning.data if inner else tuning, last)
        if value and key not in task.keys:
            having = " and ".join(tasks_with_key(key))
            yield fault(f"finetune.{key}", f"only applies to {having}; remove it")


def _splits(data: ExamplesConfig) -> Iterator[ConfigFault]:
    """Yield splits that are set twice, and fractions that leave nothing to train on."""
    for split in ("valid", "test"):
        if getattr(data, f"{split}_split") and getattr(data, f"{split}_fraction"):
            key = f"finetune.data.{split}"
            yield fault(
                f"{key}_split {key}_fraction",
                f"{split}_fraction is also set; remove one of the two",
            )
    both = (data.valid_fraction or 0) + (data.test_fraction or 0)
    if both >= 1:
        yield fault(
            "finetune.data.valid_fraction",
            f"valid_fraction + test_fraction is {both:g}, which leaves no row to train on; lower "
            "one of them",
        )


def has_held_out(config: RunConfig) -> bool:
    """Return whether a run has held-out data, by which its checkpoints can be compared."""
    if config.finetune is None:
        return bool(config.data.valid)
    data = config.finetune.data
    return any((data.valid_split, data.valid_fraction, data.test_split, data.test_fraction))
