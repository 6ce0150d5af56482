"""Tasks: what the columns of a data set mean, and its rows split for training and evaluation."""

from __future__ import annotations

from bayeslora.tasks.loading import load_task, reload_task, rows_of
from bayeslora.tasks.spec import TaskSpec, check_compatible, task_names
from bayeslora.tasks.task import Split, Task, build_task

__all__ = [
    "Split",
    "Task",
    "TaskSpec",
    "build_task",
    "check_compatible",
    "load_task",
    "reload_task",
    "rows_of",
    "task_names",
]
