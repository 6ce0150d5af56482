"""Local files that fits depend on: an address has their paths, and what was in them is kept with what a fit cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from bayeslora.app import runs
from bayeslora.app.config import RunConfig
from bayeslora.app.studies.cells import Cell
from bayeslora.app.studies.results import Results
from bayeslora.files import digest
from bayeslora.registry import loaded_files
from bayeslora.tasks.task import Splits

__all__ = ["changes", "digests"]

#: Endings of files in a folder with a network or an adapter that say what it is.
OF_NETWORKS = {".json", ".safetensors", ".bin", ".txt", ".model"}


def digests(config: RunConfig) -> dict[str, str]:
    """Digests of the local files of a run's data, base network and adapter by their paths, as they are now.

    With them go those of plug-ins, as they were when they were imported: a run may use what any of them registers. What
    comes from the hub or with the package is left out.
    """
    plugins = {str(path): then for path, then in loaded_files().items()}
    return {str(path): digest(path) for path in _files(config)} | plugins


def changes(cells: Iterable[Cell], results: Results) -> str:
    """What to say of fits that are done and whose files were others then; empty if there are none.

    A fit of a time when files were not recorded is taken as it is, and so are files that are gone.
    """
    others: dict[str, None] = {}
    fits: dict[str, None] = {}
    for cell in cells:
        then = (results.fitted(cell) or {}).get("files", {})
        differing = [path for path in then if Path(path).is_file() and digest(Path(path)) != then[path]]
        if differing:
            others |= dict.fromkeys(differing)
            fits[cell.name] = None
    if not fits:
        return ""
    return (
        f"Files have changed since these fits were made, whose results stay as they are: {', '.join(others)}. To have "
        f"them made anew, remove {', '.join(fits)} in '{results.folder / 'cells'}', or give the study another folder."
    )


def _files(config: RunConfig) -> Iterator[Path]:
    if config.data_dir is not None or Path(config.task).expanduser().exists():
        data = runs.task_of(config).data
        yield from data.files if isinstance(data, Splits) else ()
    for name in (config.base, config.adapter):
        if name is not None and name != "demo" and Path(name).is_dir():
            yield from sorted(path for path in Path(name).iterdir() if path.suffix in OF_NETWORKS and path.is_file())
