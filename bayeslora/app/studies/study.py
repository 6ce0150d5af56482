"""A study in Python: its lines, its cells, and what has come of them so far."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.app.studies.cells import Cell
from bayeslora.app.studies.expansion import Target, expand
from bayeslora.app.studies.file import StudyFile, read_study
from bayeslora.app.studies.results import Results

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Study"]


class Study:
    """Tasks, bases, methods, seeds and settings, run as cells of one folder.

    Args:
        source: YAML file (see `StudyFile`), or what such a file holds.
        folder: of the results; by default ``runs/NAME``, by the name of the file.
    """

    def __init__(self, source: str | Path | Mapping[str, Any], folder: str | Path | None = None) -> None:
        name = "study" if isinstance(source, Mapping) else Path(source).stem
        self.file: StudyFile = read_study(source)
        self.name = name
        self.results = Results(Path("runs") / name if folder is None else folder)

    @cached_property
    def targets(self) -> list[Target]:
        """Lines of the tables.

        Raises:
            SettingError: a backend, model, preset or setting is unknown, or has a value that it cannot take.
        """
        return expand(self.file)

    @property
    def cells(self) -> list[Cell]:
        """The fits of all lines, each once, those that others need before them; of choices, all that may be taken."""
        entries = [each.entry for target in self.targets for each in target.candidates]
        entries = [trial for target in self.targets for trial in target.trials] + entries
        return list({cell.name: cell for entry in entries for cell in entry.cell.chain}.values())

    def run(self, *, retry: bool = False, progress: bool = True) -> Study:
        """Do what is left, one cell after the other, and write tables and pictures into the folder.

        A cell that fails is recorded, and the others go on. What is done stays done, in this process or another.

        Args:
            retry: try again what failed before.
            progress: say each line that has come to its end, and how much time is left.
        """
        from bayeslora.app.studies.progress import Progress
        from bayeslora.app.studies.running import settle

        if retry:
            self.results.forget_errors()
        settle(self.targets, self.results, Progress(self.targets, self.results, show=progress))
        return self

    def frame(self) -> pd.DataFrame:
        """A row for each line: labels, metrics with their intervals over rows, and costs."""
        from bayeslora.app.studies.frame import frame_of

        return frame_of(self.targets, self.results)
