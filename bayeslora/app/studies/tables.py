"""Tables of a study for people: headers and rows of text, as Markdown and as LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from bayeslora.app.studies.summary import BETTER

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "TITLES",
    "Notes",
    "Table",
    "chosen_table",
    "cost_table",
    "detection_table",
    "points_tables",
    "quality_tables",
    "ranking_table",
    "robustness_table",
    "shift_table",
]

TITLES = {
    "accuracy": "accuracy",
    "mcc": "MCC",
    "nll": "NLL",
    "perplexity": "perplexity",
    "ece_15": "ECE-15",
    "ece_15_by_chance": "ECE-15 by chance",
    "brier": "Brier",
    "rmse": "RMSE",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "coverage_90": "90 % coverage",
    "kl": "KL from truth",
    "ece_true": "ECE against truth",
}
MEANS = "Means over seeds; in brackets their 95 % intervals, first over rows (bootstrap), then over seeds (t)."
#: What is said of metrics that are better neither way.
EXPLAINED = {
    "ece_15_by_chance": " ECE-15 by chance is what probabilities without any error have on average with so many rows.",
    "coverage_90": " 90 % coverage is the share of labels within the middle 90 % of their prediction: 0.9 is right.",
}
PROTOCOLS = {
    "same": "all at the same settings",
    "chosen": "each at its own, chosen on held-out rows",
    "grid": "over a grid",
}
#: Numbers of what is said below the tables, by task, base, protocol and method.
Notes: TypeAlias = Mapping[tuple[str, str, str, str], int]
#: What cannot be told from the reference by the rows and seeds that there are, or by the digits that are shown.
CHANCE = "≈"
#: How LaTeX is told signs that mean something else there.
LATEX = str.maketrans(
    {sign: rf"\{sign}" for sign in "&%_#${}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", CHANCE: r"$\approx$"}
    | {"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"}
)
COSTS = {
    "fit_seconds": ("fit, s", 1.0, ".1f"),
    "predict_seconds": ("predict, s", 1.0, ".1f"),
    "tuning_seconds": ("trials, s", 1.0, ".1f"),
    "peak_memory_bytes": ("peak memory, MiB", 2.0**20, ",.0f"),
    "parameters": ("parameters", 1.0, ",.0f"),
    "extra_parameters": ("extra parameters", 1.0, ",.0f"),
}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: above it.
        header: names of the columns; the first is that of the rows' names.
        rows: of as many cells.
        note: what its cells are.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def turned(self) -> Table:
        """The same with rows for columns."""
        header, *rows = zip(self.header, *self.rows, strict=True)
        return Table(self.title, header, rows, self.note)

    def to_markdown(self) -> str:
        """The table in Markdown, its title as a heading."""
        lines = [
            f"## {self.title}",
            "",
            *([self.note, ""] if self.note else []),
            _line(self.header),
            "|---" + "|---:" * (len(self.header) - 1) + "|",
            *(_line(row) for row in self.rows),
        ]
        return "\n".join(lines) + "\n"

    def to_latex(self) -> str:
        """The table in LaTeX for the package booktabs, its title as a caption."""
        rows = [" & ".join(map(_latex, row)) + r" \\" for row in (self.header, *self.rows)]
        note = f" {_latex(self.note)}" if self.note else ""
        lines = [
            r"\begin{table}",
            rf"\caption{{{_latex(self.title)}.{note}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def quality_tables(summary: pd.DataFrame, reference: str, notes: Notes) -> Iterator[Table]:
    """For each task, base and protocol: metrics with their intervals, and differences from the reference.

    A method that has a note bears its number.
    """
    for (task, base, protocol), part in summary.groupby(["task", "base", "protocol"], sort=False):
        metrics = [name for name in TITLES if name in set(part["metric"])]
        compared = [name for name in metrics if name in BETTER]
        found = {(row["method"], row["metric"]): row for row in part.to_dict("records")}
        methods = list(part["method"].unique())
        place = f"{task}, {base}: {PROTOCOLS[protocol]}"
        names = {method: method + _noted(notes, (task, base, protocol, method)) for method in methods}
        yield Table(
            place,
            ["method", "seeds", *(TITLES[name] for name in metrics)],
            [
                [
                    names[method],
                    str(found[method, metrics[0]]["seeds"]),
                    *_cells(_mean, found, method, metrics),
                ]
                for method in methods
            ],
            MEANS + "".join(said for name, said in EXPLAINED.items() if name in metrics),
        )
        others = [method for method in methods if "difference" in part and (method != reference)]
        if others and reference in methods:
            yield Table(
                f"{place}; less {reference}",
                ["method", *(TITLES[name] for name in compared)],
                [[names[method], *_cells(_difference, found, method, compared)] for method in others],
                f"Differences by pairs of rows and of seeds. {CHANCE} marks what is less than chance (one of the "
                "intervals holds zero) or than the digits shown.",
            )


def chosen_table(frame: pd.DataFrame) -> Table:
    """The settings that each task, base and method stands at, chosen with the first seed."""
    chosen = frame[frame["protocol"] == "chosen"].drop_duplicates(["task", "base", "method"])
    names = [name for name in chosen if name.startswith("chosen_") and chosen[name].notna().any()]
    rows = [
        [
            f"{row['task']}, {row['base']}, {row['method']}",
            *("" if row[name] != row[name] else _setting(row[name]) for name in names),  # not every method has each
        ]
        for row in chosen.dropna(subset=names, how="all").to_dict("records")
    ]
    return Table("Chosen settings", ["", *(name.removeprefix("chosen_") for name in names)], rows)


def cost_table(frame: pd.DataFrame) -> Table:
    """Means over seeds, and points of a grid, of what each method costs."""
    done = frame[frame["state"] == "done"]
    names = [name for name in COSTS if name in done]
    keys = ["task", "base", "protocol", "method"]
    means = done.groupby(keys, sort=False, as_index=False)[names].mean()
    if "tuning_seconds" in names and not means["tuning_seconds"].any():
        names.remove("tuning_seconds")
    rows = []
    for row in means.to_dict("records"):
        cells = [format(row[name] / COSTS[name][1], COSTS[name][2]) for name in names]
        rows.append([f"{row['task']}, {row['base']}, {row['method']}", row["protocol"], *cells])
    note = "A fit counts those that it starts from, and trials all that a method's settings were chosen by."
    return Table("Cost", ["", "settings", *(COSTS[name][0] for name in names)], rows, note)


def ranking_table(ranking: pd.DataFrame, reference: str) -> Table:
    """Mean ranks over tasks, and p-values, by metric."""
    metrics = [name for name in BETTER if name in set(ranking["metric"])]
    rows = []
    for (protocol, method), part in ranking.groupby(["protocol", "method"], sort=False):
        found = {row["metric"]: row for row in part.to_dict("records")}
        cells = [_rank(found[name]) if name in found else "" for name in metrics]
        rows.append([method, protocol, *cells])
    note = (
        f"1 is best; means over the {ranking['tasks'].min()} pairs of task and base on which all methods have results. "
        f"In brackets the p-value of Wilcoxon's signed-rank test over tasks against {reference}; with fewer than six "
        "tasks none can be below 0.05."
    )
    return Table("Ranks over tasks", ["method", "settings", *(TITLES[name] for name in metrics)], rows, note)


def robustness_table(robustness: pd.DataFrame, tests: pd.DataFrame | None, reference: str, notes: Notes) -> Table:
    """Measures over a grid, of each task, base and method."""
    shown = {
        "intrinsic": "1 / median NLL", "extrinsic": "median accuracy", "accuracy_spread": "best less worst",
        "accuracy_iqr": "IQR", "nll_spread": "NLL, worst less best", "nll_iqr": "IQR of NLL",
    }  # fmt: skip
    names = [name for name in shown if name in robustness and robustness[name].notna().any()]
    rows = []
    for row in robustness.to_dict("records"):
        points = f"{row['points']}" + (f", {row['failed']} failed" if row["failed"] else "")
        cells = [_number(row[name]) for name in names]
        mark = _noted(notes, (row["task"], row["base"], "grid", row["method"]))
        rows.append([f"{row['task']}, {row['base']}, {row['method']}{mark}", points, *cells])
    said = [
        f"{row['method']} {row['measure']} p = {row['wilcoxon']:.3f} ({row['pairs']})"
        for row in ([] if tests is None else tests.to_dict("records"))
        if row["pairs"] > 1
    ]
    note = f"Wilcoxon's signed-rank test over tasks against {reference} (pairs): {'; '.join(said)}." if said else ""
    return Table("Robustness over the grid", ["", "points", *(shown[name] for name in names)], rows, note)


def points_tables(points: pd.DataFrame, names: Sequence[str]) -> Iterator[Table]:
    """For each task and base: the metrics of each method, a row for each point of the grid."""
    for (task, base), part in points.groupby(["task", "base"], sort=False):
        metrics = [name for name in TITLES if name in part and part[name].notna().any()]
        methods = list(part["method"].unique())
        rows = []
        for point, found in part.groupby(list(names), sort=False, dropna=False):
            of_methods = found.set_index("method")[metrics].reindex(methods)
            rows.append([", ".join(map(_setting, point)), *(_several(values) for values in of_methods.to_numpy())])
        note = f"{' / '.join(TITLES[name] for name in metrics)}; means over seeds."
        yield Table(f"{task}, {base}: at each point of the grid", [", ".join(names), *methods], rows, note)


def detection_table(detection: pd.DataFrame) -> Table:
    """Areas under curves, of each group and what is detected."""
    rows = []
    for row in detection.to_dict("records"):
        risk = row.get("risk", math.nan)
        place = f"{row['task']}, {row['base']}, {row['method']}"
        measures = [_number(row["entropy"]), _number(row["mutual_information"]), _number(risk)]
        rows.append([place, row["protocol"], row["detected"], *measures])
    note = (
        "Area under the ROC curve of the predictive entropy and of the mutual information (0.5 is chance), of mistakes "
        "or of rows of another kind; and the area under the curve of risk by coverage."
    )
    return Table("Detection", ["", "settings", "detected", "entropy", "mutual information", "risk"], rows, note)


def shift_table(shift: pd.DataFrame) -> Table:
    """Metrics on other rows than the task's own."""
    metrics = [name for name in BETTER if name in shift]
    rows = []
    for row in shift.to_dict("records"):
        place = f"{row['task']}, {row['base']}, {row['method']}"
        rows.append([place, row["protocol"], row["shift"], str(row["rows"]), *(_number(row[name]) for name in metrics)])
    header = ["", "settings", "rows of", "rows", *(TITLES[name] for name in metrics)]
    return Table("Shift", header, rows, "Metrics on rows that are not of the split of the task; means over seeds.")


def _cells(
    shown: Callable[[Mapping[str, Any]], str],
    found: Mapping[tuple[str, str], Mapping[str, Any]],
    method: str,
    metrics: Iterable[str],
) -> list[str]:
    """Metrics of a method as text; empty where it lacks one, as where its predictions do not know the truth."""
    return [shown(found[method, name]) if (method, name) in found else "" for name in metrics]


def _noted(notes: Notes, line: tuple[str, str, str, str]) -> str:
    """What refers to the note of a line, if it has one."""
    return f" [{notes[line]}]" if line in notes else ""


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _mean(row: Mapping[str, Any]) -> str:
    return _number(row["value"]) + _ends(row, "rows", "seeds")


def _difference(row: Mapping[str, Any]) -> str:
    if math.isnan(row["difference"]):
        return ""
    difference = f"{row['difference']:+.3f}"
    mark = f" {CHANCE}" if row["chance"] or not float(difference) else ""
    return difference + _ends(row, "difference_rows", "difference_seeds") + mark


def _ends(row: Mapping[str, Any], *names: str) -> str:
    """Intervals that there are, in brackets."""
    pairs = [(row[f"{name}_low"], row[f"{name}_high"]) for name in names]
    said = [f"{low:.3f} to {high:.3f}" for low, high in pairs if not math.isnan(low)]
    return f" ({'; '.join(said)})" if said else ""


def _rank(row: Mapping[str, Any]) -> str:
    rank = "" if math.isnan(row["rank"]) else f"{row['rank']:.2f}"
    return rank + ("" if math.isnan(row["wilcoxon"]) else f" ({row['wilcoxon']:.3f})")


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _setting(value: Any) -> str:
    """The value of a setting, which among numbers is not a number where it is none."""
    if isinstance(value, float):
        return "none" if math.isnan(value) else f"{value:g}"
    return str(value)


def _several(values: Iterable[float]) -> str:
    """Numbers side by side; empty if there are none."""
    found = [_number(value) for value in values]
    return " / ".join(found) if any(found) else ""


def _latex(text: str) -> str:
    return text.translate(LATEX)
