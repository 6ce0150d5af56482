"""Local files that fits and predictions depend on: an address has their paths, and a result what was in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bayeslora.app import runs
from bayeslora.app.config import RunConfig
from bayeslora.app.studies.expansion import Target
from bayeslora.app.studies.results import Results
from bayeslora.app.studies.study import cells_of, entries_of
from bayeslora.files import fingerprint
from bayeslora.registry import loaded_files
from bayeslora.tasks.task import Splits, Task

__all__ = ["changes", "changes_since_begun", "fingerprints", "fingerprints_of_rows"]

#: Endings of files in a folder with a network or an adapter that say what it is.
OF_NETWORKS = {".json", ".safetensors", ".bin", ".txt", ".model"}


def fingerprints(config: RunConfig) -> dict[str, str]:
    """Fingerprints of the local files of a run's data, base network and adapter by their paths, as they are now.

    With them go those of plug-ins, as they were when they were imported: a run may use what any of them registers. What
    comes from the hub or with the package is left out.
    """
    plugins = {str(path): then for path, then in loaded_files().items()}
    return {str(path): fingerprint(path) for path in _files(config)} | plugins


def fingerprints_of_rows(task: Task, name: str, data_dir: str | None) -> dict[str, str]:
    """Fingerprints of the local files that a task is read from, by their paths.

    Args:
        task: that was loaded.
        name: which it was loaded by.
        data_dir: folder that was given with it.
    """
    return {str(path.absolute()): fingerprint(path) for path in _files_of(task, name, data_dir)}


def changes(targets: Sequence[Target], results: Results) -> str:
    """What to say of fits and predictions that are done and whose files were others then; empty if there are none.

    One of a time when files were not recorded is taken as it is, and so are files that are gone.
    """
    others: dict[str, None] = {}
    places: dict[str, None] = {}
    for cell, place, then in _done(targets, results):
        differing = [path for path in then if Path(path).is_file() and fingerprint(Path(path)) != then[path]]
        if differing and cell not in places:  # of a fit that is made anew, so are the predictions
            others |= dict.fromkeys(differing)
            places[place] = None
    if not places:
        return ""
    return (
        "Files have changed since these fits and predictions were made, whose results stay as they are: "
        f"{', '.join(others)}. To have them made anew, remove {', '.join(places)} in '{results.folder / 'cells'}', or "
        "give the study another folder."
    )


def changes_since_begun(then: Mapping[str, str], config: RunConfig, folder: Path) -> str:
    """What to say of a fit that was stopped and whose files were others when it was begun; empty if none was.

    Args:
        then: fingerprints of its files when it was begun.
        config: of its run.
        folder: of its cell.
    """
    now = {str(path): fingerprint(path) for path in _files(config)}  # with another plug-in it can go on
    differing = [path for path, known in then.items() if now.get(path, known) != known]
    if not differing:
        return ""
    return (
        f"Files have changed since this fit was begun: {', '.join(differing)}. It cannot go on with others: remove the "
        f"folder '{folder}' to fit anew, or put the files back and give --retry (in Python retry=True)."
    )


def _done(targets: Sequence[Target], results: Results) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Fits and then predictions: the name of the cell, the place among the cells, and fingerprints of what was read."""
    for cell in cells_of(targets):
        yield cell.name, cell.name, (results.fitted(cell) or {}).get("files", {})
    for entry in entries_of(targets):
        for each in entry.evaluations.values():
            place = results.evaluation(entry.cell, each).relative_to(results.folder / "cells")
            found = results.evaluated(entry.cell, each) or {}
            yield entry.cell.name, place.as_posix(), found.get("files", {})


def _files(config: RunConfig) -> Iterator[Path]:
    if _is_local(config.task, config.data_dir):
        yield from _files_of(runs.task_of(config), config.task, config.data_dir)
    for name in (config.base, config.adapter):
        if name is not None and name != "demo" and Path(name).is_dir():
            yield from sorted(path for path in Path(name).iterdir() if path.suffix in OF_NETWORKS and path.is_file())


def _files_of(task: Task, name: str, data_dir: str | None) -> list[Path]:
    return task.data.files if _is_local(name, data_dir) and isinstance(task.data, Splits) else []


def _is_local(name: str, data_dir: str | None) -> bool:
    """Whether a task is read from files of a user's own, rather than from the hub or the package."""
    return data_dir is not None or Path(name).expanduser().exists()
