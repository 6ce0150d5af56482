"""Execute every notebook in place: ``python scripts/run_notebooks.py``; an error in a cell ends with its traceback."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"


def execute(path: Path) -> None:
    """Run a notebook and keep its outputs."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, record_timing=False, resources=where).execute()
    for cell in notebook.cells:
        # Warnings name folders of the machine that ran the notebook.
        cell["outputs"] = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
        if cell["cell_type"] != "code":
            del cell["outputs"]
    nbformat.write(notebook, path)


def main() -> None:
    """Run the notebooks, two at a time with a thread each: their networks are too small to share one among threads."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(execute, sorted(FOLDER.glob("*.ipynb"))))


if __name__ == "__main__":
    main()
