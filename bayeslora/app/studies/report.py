"""Everything that came of a study, as files: Markdown, CSV, JSON, LaTeX and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora import files
from bayeslora.app.studies import tables
from bayeslora.app.studies.detection import detection_of, shift_of
from bayeslora.app.studies.figures import boxes, curves, pareto, reliabilities, risks
from bayeslora.app.studies.frame import frame_of
from bayeslora.app.studies.inputs import changes
from bayeslora.app.studies.ranking import ranking_of
from bayeslora.app.studies.robustness import by_point, robustness_of, robustness_tests
from bayeslora.app.studies.summary import summary_of
from bayeslora.app.studies.warned import notes_of, warnings_table
from bayeslora.predict.plots import save_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from bayeslora.app.studies.study import Study

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Tables and pictures of what there is of a study.

    Attributes:
        study: whose results they are.
    """

    study: Study

    @property
    def reference(self) -> str:
        """The method that others are compared with."""
        return self.study.file.reference or next(iter(self.study.file.methods))

    @cached_property
    def frame(self) -> pd.DataFrame:
        """See `frame_of`."""
        return frame_of(self.study.targets, self.study.results)

    @property
    def failures(self) -> pd.DataFrame:
        """The lines that failed, and those with a result that lack one on a shift."""
        lacking = (self.frame["state"] == "done") & (self.frame["error"] != "")
        return self.frame[(self.frame["state"] == "failed") | lacking]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """See `summary_of`."""
        return summary_of(self.study.targets, self.study.results, self.reference)

    @cached_property
    def parts(self) -> dict[str, pd.DataFrame]:
        """All tables that the study has, by name."""
        found = {"results": self.frame}
        if not self.summary.empty:
            found |= {"summary": self.summary, "ranks": ranking_of(self.summary, self.reference)}
            found["detection"] = detection_of(self.study.targets, self.study.results)
            found["shift"] = shift_of(self.study.targets, self.study.results)
        if self.study.file.grid:
            found["points"] = by_point(self.frame, list(self.study.file.grid))
            found["robustness"] = robustness_of(self.frame, list(self.study.file.grid))
            found["robustness_tests"] = robustness_tests(found["robustness"], self.reference)
        return {name: table for name, table in found.items() if not table.empty}

    def tables(self) -> Iterator[tables.Table]:
        """Tables for people."""
        parts, notes = self.parts, notes_of(self.frame)
        if "summary" in parts:
            yield from tables.quality_tables(parts["summary"], self.reference, notes)
            if self.study.file.tuning:
                yield tables.chosen_table(self.frame)
            if len(parts["summary"][["task", "base"]].drop_duplicates()) > 1:
                yield tables.ranking_table(parts["ranks"], self.reference)
        if "robustness" in parts:
            yield tables.robustness_table(parts["robustness"], parts.get("robustness_tests"), self.reference, notes)
        if "points" in parts:
            yield from tables.points_tables(parts["points"], list(self.study.file.grid))
        if (self.frame["state"] == "done").any():
            yield tables.cost_table(self.frame)
        if "shift" in parts:
            yield tables.shift_table(parts["shift"])
        if "detection" in parts:
            yield tables.detection_table(parts["detection"])
        if notes:
            yield warnings_table(self.frame, notes)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Pictures by name."""
        if "summary" in self.parts:
            yield "pareto", pareto(self.summary, self.frame)
        if "detection" in self.parts:  # there are classes
            yield "reliability", reliabilities(self.study.targets, self.study.results)
            yield "risk", risks(self.study.targets, self.study.results)
        if "points" in self.parts:
            yield "robustness", boxes(self.parts["points"])
            name, *others = self.study.file.grid
            along = self.parts["points"][name]
            if not others and along.dtype.kind in "if" and along.notna().all():
                yield "curves", curves(self.parts["points"], name)

    def to_markdown(self) -> str:
        """All tables, and what is missing."""
        states = self.frame["state"].value_counts()
        counts = ", ".join(f"{states.get(name, 0)} {said}" for name, said in STATES.items() if states.get(name, 0))
        lines = [f"# {self.study.name}", "", f"{len(self.frame)} lines: {counts}.", ""]
        if changed := changes(self.study.targets, self.study.results):
            lines += [f"**{changed}**", ""]
        failed = self.failures
        labels = ["task", "base", "method", "seed", "protocol", *self.study.file.grid]
        named = failed[labels].astype(object).where(failed[labels].notna(), "none").to_numpy()
        lines += [f"- {', '.join(map(str, row))}: {said}" for row, said in zip(named, failed["error"], strict=True)]
        return "\n".join([*lines, "", *(table.to_markdown() for table in self.tables())])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what JSON lacks, such as infinity, is null."""
        records = {name: json.loads(table.to_json(orient="records")) for name, table in self.parts.items()}
        return {"study": json.loads(json.dumps(self.study.source, default=str)), "reference": self.reference, **records}

    def save(self, folder: str | Path) -> None:
        """Write study.md, study.json, tables.tex, a CSV for each table, and the pictures, each file in one step.

        Files that an earlier report wrote there and this one does not are removed; study.json names those of a report.
        """
        folder = Path(folder)
        texts = {"study.md": self.to_markdown(), "tables.tex": "\n".join(table.to_latex() for table in self.tables())}
        texts |= {f"{name}.csv": table.to_csv(index=False) for name, table in self.parts.items()}
        for name, text in texts.items():
            files.write_text(folder / name, text)
        written = ["study.json", *texts]
        for name, figure in self.figures():
            save_figure(figure, folder / f"{name}.png")
            written.append(f"{name}.png")
        for name in _written(folder) - set(written):
            (folder / name).unlink(missing_ok=True)
        files.write_json(folder / "study.json", {**self.to_dict(), "files": written})


def _written(folder: Path) -> set[str]:
    """Names of the files that an earlier report wrote into a folder, as its study.json has them."""
    try:
        names = json.loads((folder / "study.json").read_text(encoding="utf-8"))["files"]
        return {name for name in names if Path(name).name == name and (folder / name).is_file()}
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is no report's
        return set()


#: What the states of lines are called.
STATES = {"done": "done", "failed": "failed", "open": "not done yet"}
