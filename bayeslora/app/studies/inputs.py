"""Local files that fits depend on: an address has their paths, and what was in them is kept with what a fit cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path

from bayeslora.app import runs
from bayeslora.app.config import RunConfig
from bayeslora.app.studies.cells import Cell
from bayeslora.app.studies.results import Results
from bayeslora.tasks.task import Splits

__all__ = ["changes", "digests"]

#: Endings of files in a folder with a network or an adapter that say what it is.
OF_NETWORKS = {".json", ".safetensors", ".bin", ".txt", ".model"}
#: Bytes of a file that is read as a whole; of a larger one, as many parts of so many bytes are.
WHOLE, PARTS, PART = 2**28, 64, 2**20


def digests(config: RunConfig) -> dict[str, str]:
    """Digests of the local files of a run's data, base network and adapter by their paths, as they are now.

    What comes from the hub or with the package is left out.
    """
    return {str(path): _digest(path) for path in _files(config)}


def changes(cells: Iterable[Cell], results: Results) -> str:
    """What to say of fits that are done and whose files were others then; empty if there are none.

    A fit of a time when files were not recorded is taken as it is, and so are files that are gone.
    """
    others: dict[str, None] = {}
    fits: dict[str, None] = {}
    for cell in cells:
        then = (results.fitted(cell) or {}).get("files", {})
        differing = [path for path in then if Path(path).is_file() and _digest(Path(path)) != then[path]]
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


def _digest(path: Path) -> str:
    known = path.stat()
    return _read(path, known.st_size, known.st_mtime_ns)


@cache
def _read(path: Path, size: int, changed: int) -> str:
    """Digest of a file's content, read once as long as its size and the time of its change are the same."""
    found = sha256(str(size).encode())
    with path.open("rb") as content:
        if size <= WHOLE:
            found.update(content.read())
        else:
            for number in range(PARTS):
                content.seek((size - PART) * number // (PARTS - 1))
                found.update(content.read(PART))
    return found.hexdigest()[:16]
