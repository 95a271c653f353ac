"""Fine-tuning tasks: how to read a row, and which of its tokens are targets. One file a task."""

from __future__ import annotations

from importlib import import_module

from data_prep.tasks.base import ExampleTask, TaskContext
from megalite.config.tasks import find_task

__all__ = ["ExampleTask", "TaskContext", "task_class"]


def task_class(name: str) -> type[ExampleTask]:
    """Return the class that makes the examples of a task."""
    module, _, kind = find_task(name).examples.partition(":")
    example_class: type[ExampleTask] = getattr(import_module(module), kind)
    return example_class
