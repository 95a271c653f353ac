"""Fine-tuning tasks: how a row is read, and which of its tokens are learned. One file a task."""

from __future__ import annotations

from importlib import import_module

from data_prep.tasks.base import ExampleTask, TaskContext

__all__ = ["ExampleTask", "TaskContext", "task_class"]


def task_class(name: str) -> type[ExampleTask]:
    """Return the class of the task `finetune.task`: TASK in the module of the task's name."""
    found: type[ExampleTask] = import_module(f"data_prep.tasks.{name}").TASK
    return found
