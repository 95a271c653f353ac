"""Fine-tuning tasks: one `TaskSpec` each, which rules, data preparation and training read.

A new task needs one entry here and one class of examples (`data_prep.tasks`). A package adds a task
with an entry point `task.NAME` whose object is a `TaskSpec`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megalite import registry


@dataclass(frozen=True)
class TaskSpec:
    """A fine-tuning task.

    Attributes:
        examples: the class that turns a row into an example, as "module:class".
        architectures: the architectures that can learn the task. Empty means all.
        keys: the optional keys of the finetune section that apply to the task.
        metrics: metrics that may select the best checkpoint; the first is the default.
        has_labels: whether the task predicts one of a fixed set of labels, with a classifier's
            head. Such a model generates no text.
        reads_source: whether an example has a source text in addition to the target.
        uses_template: whether examples are conversations that a chat template renders.
    """

    examples: str
    architectures: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("loss",)
    has_labels: bool = False
    reads_source: bool = False
    uses_template: bool = False


registry.tasks.register("classification")(
    TaskSpec(
        examples="data_prep.tasks.classification:Classification",
        keys=("pooling", "class_weights", "balance_classes", "data.labels"),
        metrics=("accuracy", "loss", "precision", "recall", "f1"),
        has_labels=True,
    )
)
registry.tasks.register("sft")(
    TaskSpec(
        examples="data_prep.tasks.sft:SupervisedFineTuning",
        architectures=("decoder",),
        keys=("data.packing", "data.chat_template", "data.prompt_column"),
        uses_template=True,
    )
)
registry.tasks.register("language_modeling")(
    TaskSpec(
        examples="data_prep.tasks.language_modeling:LanguageModeling",
        architectures=("decoder",),
        keys=("data.packing",),
    )
)
registry.tasks.register("seq2seq")(
    TaskSpec(
        examples="data_prep.tasks.seq2seq:Seq2Seq",
        architectures=("encoder_decoder",),
        reads_source=True,
    )
)


def find_task(name: str) -> TaskSpec:
    """Return the task of a name.

    Raises:
        UserError: the task comes from a package and cannot be imported.
    """
    task: TaskSpec = registry.tasks.load(name)
    return task


def tasks_with_key(key: str) -> list[str]:
    """Return the built-in tasks that a key of the finetune section applies to."""
    return [name for name in registry.tasks.builtin if key in find_task(name).keys]


def optional_keys() -> Iterable[str]:
    """Return the keys that apply only to some built-in tasks, in the order of the tasks."""
    keys: dict[str, Any] = {}
    for name in registry.tasks.builtin:
        keys |= dict.fromkeys(find_task(name).keys)
    return keys
