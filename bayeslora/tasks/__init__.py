"""Tasks: what the columns of a data set mean, and its rows split for training and evaluation."""

from __future__ import annotations

from bayeslora.tasks.loading import build_task, load_task, reload_task
from bayeslora.tasks.spec import TaskSpec, task_names
from bayeslora.tasks.task import Split, Task

__all__ = ["Split", "Task", "TaskSpec", "build_task", "load_task", "reload_task", "task_names"]
