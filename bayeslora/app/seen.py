"""Rows that a fit has seen: what is chosen or measured on them looks better than it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from bayeslora import store
from bayeslora.app.config import RunConfig
from bayeslora.errors import DataError, TaskError
from bayeslora.identity import differing
from bayeslora.record import RECORD, read_record

if TYPE_CHECKING:
    from bayeslora.passes import Rows
    from bayeslora.posterior import Posterior
    from bayeslora.tasks import Split, Task

__all__ = ["flattered", "warn_of_seen"]

#: Arguments of a task that say which of its rows are trained on and which are not.
ARGUMENTS = ("train_size", "heldout_size", "test_size", "seed")


def warn_of_seen(config: RunConfig, task: Task) -> None:
    """Say if the adapter was trained on rows that are cut off here, as far as it is known what it was trained on."""
    from bayeslora.tasks import reload_task

    folder = None if config.adapter is None else Path(store.adapter_at(config.adapter))
    cut = {"held-out": task.heldout, "test": task.test if "test_size" in task.arguments else None}
    if folder is None or not any(cut.values()) or not (folder / RECORD).is_file():
        return
    described = read_record(folder)
    record, spec = described.record, described.program["spec"]
    if record.task is None or spec is None or not differing(record.task, task.arguments):
        return
    try:
        theirs = reload_task({"spec": spec, "arguments": record.task}).train
    except (TaskError, DataError):  # they are not where they were
        return
    known = {repr(theirs.spec.texts(row)) for row in record.trained(theirs.dataset)}
    differ = [name for name in ARGUMENTS if record.task.get(name) != task.arguments.get(name)]
    sizes = [f"{name}={record.task.get(name, 0)}" for name in differ]
    remedy = f" Give those of the adapter's own run: {', '.join(sizes)}." if sizes else ""
    for name, rows in cut.items():
        if rows is not None and (seen := sum(repr(task.spec.texts(row)) in known for row in rows.dataset)):
            warnings.warn(
                f"{seen:,} of the {len(rows):,} {name} rows are among those that the adapter was trained on: what is "
                f"chosen or measured on them will look better than it is.{remedy}",
                stacklevel=2,
            )


def flattered(posterior: Posterior, rows: Split | Rows, split: str) -> list[str]:
    """What is to be said of rows of a split on which the fit chose something: nothing of others."""
    from bayeslora.inference.aside import chose_on

    if not chose_on(posterior, rows):
        return []
    return [
        f"On the rows of '{split}' the fit chose a temperature or a width: what uses it is likely to look somewhat "
        "better here than on other rows."
    ]
