"""A study in Python: its lines, its cells, and what has come of them so far."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.app.config import read_yaml
from bayeslora.app.studies.cells import Cell, Entry, address
from bayeslora.app.studies.expansion import Target, expand
from bayeslora.app.studies.file import StudyFile
from bayeslora.app.studies.results import Results
from bayeslora.errors import SettingError

if TYPE_CHECKING:
    import pandas as pd

    from bayeslora.app.studies.report import Report

__all__ = ["Study", "cells_of", "entries_of"]


class Study:
    """Tasks, bases, methods, seeds and settings, run as cells of one folder.

    Args:
        source: YAML file (see `StudyFile`), or what such a file holds.
        folder: of the results; by default ``runs/NAME``, by the name of the file.
    """

    def __init__(self, source: str | Path | Mapping[str, Any], folder: str | Path | None = None) -> None:
        self.name = Path(folder or "study").resolve().name if isinstance(source, Mapping) else Path(source).stem
        self.source = source if isinstance(source, Mapping) else read_yaml(Path(source), "study")
        self.file = StudyFile.from_dict(self.source)
        self.results = Results(Path("runs") / self.name if folder is None else folder)
        self._written: Report | None = None

    @cached_property
    def targets(self) -> list[Target]:
        """Lines of the tables.

        Raises:
            SettingError: a backend, model, preset or setting is unknown, or has a value that it cannot take.
        """
        return expand(self.file)

    @property
    def cells(self) -> list[Cell]:
        """The fits of all lines, see `cells_of`."""
        return cells_of(self.targets)

    def part(self, shard: tuple[int, int] | None) -> list[Target]:
        """The lines of one of several parts, which have as many each, of all methods.

        Args:
            shard: number of the part, from 1 on, and of parts; all lines, if left out.

        Raises:
            SettingError: there is no such part.
        """
        if shard is None:
            return self.targets
        number, parts = shard
        if not 1 <= number <= parts:
            raise SettingError(f"A part of a study is one from 1/{parts} to {parts}/{parts}, found {number}/{parts}.")
        mixed = sorted(range(len(self.targets)), key=lambda place: address(self.targets[place].title))
        return [self.targets[place] for place in sorted(mixed[number - 1 :: parts])]

    def run(
        self,
        *,
        workers: int | None = None,
        launcher: str = "local",
        options: Mapping[str, str] | None = None,
        shard: tuple[int, int] | None = None,
        plugins: Sequence[str | Path] = (),
        retry: bool = False,
        progress: bool = True,
    ) -> Study:
        """Do what is left of the study. What is done stays done, in this process or in others on the same folder.

        Tables and pictures of what there is by then come into the folder ``report``. A cell that fails is recorded, and
        the others go on. Of fits and predictions that are done and whose local files or plug-ins have changed since,
        there is a warning.

        Args:
            workers: processes that share the cells; without it, and with the launcher "local", this process does all.
            launcher: what starts them: "local", each with its own device; "submitit", on Slurm; or "ray".
            options: of the launcher; see `bayeslora.app.studies.launching`.
            shard: number of a part, from 1 on, and of parts: its lines alone, and what they need.
            plugins: files that processes import before.
            retry: try again what failed before.
            progress: say each line that has come to its end, and how much time is left.

        Raises:
            SettingError: the launcher is unknown, or a setting of the study is wrong.
            TaskError, DataError: a task lacks a split that is to be predicted, or its labels, or none can be loaded, or
                that of a shift cannot or has other classes; nothing is fitted then.
        """
        from bayeslora.app.studies.inputs import changes
        from bayeslora.app.studies.launching import launch
        from bayeslora.app.studies.progress import Progress
        from bayeslora.app.studies.running import check_rows, settle
        from bayeslora.app.studies.work import Job

        targets = self.part(shard)
        if retry:
            self.results.forget_errors()
        check_rows(targets, self.results)
        if changed := changes(self.targets, self.results):
            warnings.warn(changed, stacklevel=2)
        told = Progress(targets, self.results, workers or 1, show=progress)
        if workers is None and launcher == "local":
            settle(targets, self.results, told, bars=progress)
        else:
            places = tuple(str(Path(each).resolve()) for each in plugins)
            job = Job(self.source, str(self.results.folder.resolve()), str(Path.cwd()), places, shard)
            launch(job, targets, self.results, launcher, workers or 1, options or {}, told)
        with self.results.reporting() as folder:
            self._written = self.report()
            self._written.save(folder)
        return self

    @property
    def reported(self) -> Report:
        """The report that `run` wrote last; while it has written none, what `report` gives now."""
        return self._written or self.report()

    def frame(self) -> pd.DataFrame:
        """A row for each line, whatever has come of it: labels, metrics with their intervals over rows, and costs."""
        from bayeslora.app.studies.frame import frame_of

        return frame_of(self.targets, self.results)

    def report(self) -> Report:
        """Tables, comparisons and pictures of what there is."""
        from bayeslora.app.studies.report import Report

        return Report(self)


def cells_of(targets: Sequence[Target]) -> list[Cell]:
    """The fits of lines, each once, those that others need before them; of choices, all that may be taken."""
    return list({cell.name: cell for entry in entries_of(targets) for cell in entry.cell.chain}.values())


def entries_of(targets: Sequence[Target]) -> list[Entry]:
    """Fits of lines with their predictions, first those that settings are chosen by; of choices, all."""
    trials = [trial for target in targets for trial in target.trials]
    return trials + [each.entry for target in targets for each in target.candidates]
