"""Fine-tuning tasks: how a row is read, and which of its tokens are learned. One file a task."""

from __future__ import annotations

from importlib import import_module

from data_prep.tasks.base import ExampleTask, TaskContext
from megalite.config.tasks import find_task

__all__ = ["ExampleTask", "TaskContext", "task_class"]


def task_class(name: str) -> type[ExampleTask]:
    """Return the class of examples of the task `finetune.task`."""
    module, _, kind = find_task(name).examples.partition(":")
    found: type[ExampleTask] = getattr(import_module(module), kind)
    return found
