"""Execute every notebook in place: ``python scripts/run_notebooks.py``; an error in a cell ends with its traceback."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"


def main() -> None:
    """Run the notebooks in the order of their names and keep their outputs."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(notebook, timeout=600, record_timing=False, resources=where).execute()
        for cell in notebook.cells:
            # Warnings name folders of the machine that ran the notebook.
            cell["outputs"] = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
            if cell["cell_type"] != "code":
                del cell["outputs"]
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
