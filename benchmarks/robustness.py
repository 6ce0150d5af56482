"""Robustness over both tasks, from the points of all runs: ``python benchmarks/robustness.py``.

``benchmarks/studies/robustness.yaml`` was run in parts, by task and by method, so that no run's own report has all of
it. This one reads the points of all of them (those with three digits are from tables), draws the figure, and writes
what a report says of a grid, with methods compared over tasks and over points.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from bayeslora.app.studies.figures import boxes
from bayeslora.app.studies.ranking import signed_rank
from bayeslora.app.studies.robustness import robustness_of, robustness_tests
from bayeslora.app.studies.tables import Table, robustness_table

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks/studies/robustness.yaml"
RESULTS = ROOT / "benchmarks/results/robustness"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the points, and write the picture and the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=Path, default=RESULTS / "points.csv")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/images/robustness.png")
    parser.add_argument("--report", type=Path, default=RESULTS / "both.md")
    asked = parser.parse_args(arguments)
    study = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    points = in_order(pd.read_csv(asked.points), study)
    boxes(points).savefig(asked.figure, dpi=110, bbox_inches="tight")
    robustness = robustness_of(points.assign(protocol="grid", state="done"), list(study["grid"]))
    reference = study["reference"]
    tables = [
        robustness_table(robustness, robustness_tests(robustness, reference), reference, {}),
        over_points(points, list(study["grid"]), reference),
    ]
    asked.report.write_text("\n".join(table.to_markdown() for table in tables), encoding="utf-8")


def in_order(points: pd.DataFrame, study: Mapping[str, Any]) -> pd.DataFrame:
    """The points of a study's own tasks and methods, in its order; others are of former defaults."""
    orders = {"task": list(study["tasks"]), "method": list(study["methods"])}
    own = points[points["task"].isin(orders["task"]) & points["method"].isin(orders["method"])]
    return own.sort_values(list(orders), key=lambda column: column.map(orders[column.name].index), kind="stable")


def over_points(points: pd.DataFrame, names: list[str], reference: str) -> Table:
    """Each method against the reference at the same points of the grid, over all tasks together.

    Args:
        points: a row for each task, base, method and point.
        names: of the settings that the grid varies.
        reference: method that the others are compared with.
    """
    at = ["task", "base", *names]
    rows = []
    for method in (name for name in points["method"].unique() if name != reference):
        cells = [method]
        for metric, better in (("nll", -1), ("accuracy", 1)):
            both = points.pivot(index=at, columns="method", values=metric)[[method, reference]].dropna()
            gains = better * (both[method] - both[reference]).to_numpy()
            p, _ = signed_rank(gains)
            cells += [f"{(gains > 0).sum()} of {len(gains)}", f"{gains.mean():+.3f}", f"{p:.1g}"]
        rows.append(cells)
    header = ["", "less NLL", "by, mean", "p", "more accurate", "by, mean", "p"]
    note = (
        f"At how many points of the grid a method is better than {reference}, by how much on average over all of them, "
        "and the p-value of Wilcoxon's signed-rank test over points. Those of one task share its rows and the seed, so "
        "that p is of these tasks, not of others."
    )
    return Table("Point by point", header, rows, note)


if __name__ == "__main__":
    main()
