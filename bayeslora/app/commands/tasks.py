"""Show a task as it is read."""

from __future__ import annotations

from typing import Annotated

import typer

from bayeslora.app.options import Assignments, DataDir
from bayeslora.app.terminal import say, show

__all__ = ["show_task"]


def show_task(
    name: Annotated[str, typer.Argument(help="Known task, or path or hub name of your own data.", show_default=False)],
    data_dir: DataDir = None,
    split: Annotated[str, typer.Option(help="Whose row: train, validation, test or another split.")] = "train",
    row: Annotated[int, typer.Option(help="Number of the row.", min=0)] = 0,
    assignments: Assignments = None,
) -> None:
    """One row of a task as each observation that fits it reads the row, and what answers it."""
    from bayeslora.app.config import assign
    from bayeslora.app.resolving import task_settings
    from bayeslora.errors import DataError, SettingError
    from bayeslora.observations import OBSERVATIONS
    from bayeslora.tasks import load_task

    given = assign({}, assignments or ())
    if set(given) - {"task_settings"}:
        raise SettingError("tasks show takes --set for settings of the task alone, such as task.label=answer.")
    task = load_task(name, data_dir, **task_settings(given.get("task_settings", {})))
    say(*task.notes)
    rows = task.split(split)
    if row >= len(rows):
        raise DataError(f"Split '{split}' of task '{task.spec.name}' has {len(rows):,} rows: there is no row {row}.")
    show(task.summary().splitlines()[0])
    label = rows.labels()[row].item() if rows.labelled else None
    for each in (OBSERVATIONS[name] for name in OBSERVATIONS):
        if task.spec.kind in each.kinds:
            reader = ", by a causal language model" if each.causal else ""
            show(f"\n[{each.name}{reader}]\n{each.of(task.spec).shown(task.spec, rows.dataset[row], label)}")
