"""Accuracy and calibration of SVI against plain LoRA, on four tasks of GLUE with little data.

    python benchmarks/quality.py run --base sentence-transformers/all-MiniLM-L6-v2 --threads 1
    python benchmarks/quality.py report

LoRA of rank 8 on all linear layers, 1,000 training rows (CoLA 2,000) and 300 more held back, 10 epochs, the last
epoch, seeds 0 to 2, evaluated on the validation split. Nothing is chosen on that split; the temperature of plain LoRA
is fitted on the held-back rows. With MiniLM a run takes a few minutes on one CPU core, all 36 some hours; the same
command in several terminals shares the runs. The report takes seconds: it prints a Markdown table and verdicts, and
writes benchmarks/results/quality.json and docs/images/reliability-glue.png. It works on the runs that are there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common import (
    ARMS,
    METRICS,
    RESULTS,
    SETTINGS,
    TITLES,
    TRAIN_SIZES,
    Run,
    command_line,
    markdown,
    read_runs,
    value,
    work,
)

from bayeslora.files import write_json

FIGURE = RESULTS.parent.parent / "docs" / "images" / "reliability-glue.png"
NAMES = {"mrpc": "MRPC", "sst2": "SST-2", "cola": "CoLA", "rte": "RTE"}
#: At 1,000 rows plain LoRA is hardly better than guessing on RTE, so a point of accuracy there says nothing.
NOT_LEARNED = ("rte",)
COLUMNS = {
    "accuracy": "accuracy",
    "mcc": "MCC",
    "nll": "NLL",
    "brier": "Brier",
    "ece_15": "ECE-15",
    "seconds": "seconds",
}
LARGEST_NLL_RATIO, LARGEST_NLL_RATIO_TO_SCALED, TASKS_BELOW_SCALED = 0.5, 1.05, 2
LARGEST_ECE, LARGEST_LOSS_OF_ACCURACY = 0.07, 0.01


def plan(tasks: Sequence[str], seeds: Sequence[int], backends: Sequence[str]) -> list[Run]:
    """All runs: those that the verdicts need seed by seed, MAP after them."""
    later = [backend for backend in backends if backend == "map"]
    first = [backend for backend in backends if backend != "map"]
    return [
        Run(task, backend, seed, TRAIN_SIZES[task], settings=dict(SETTINGS.get(backend, {})))
        for group in (first, later)
        for seed in seeds
        for task in tasks
        for backend in group
    ]


class Figures:
    """The finished runs' figures by task, arm and seed."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.by_seed: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        for record in records:
            run = record["run"]
            for arm in record["arms"]:
                figures = {metric: value(record, arm, metric) for metric in (*METRICS, "seconds")}
                self.by_seed.setdefault((run["task"], arm), {})[run["seed"]] = figures

    @property
    def tasks(self) -> list[str]:
        """Tasks with a finished run, in the order of the protocol."""
        return [task for task in TRAIN_SIZES if any(key[0] == task for key in self.by_seed)]

    def seeds(self, task: str, *arms: str) -> list[int]:
        """Seeds that all of ``arms`` have."""
        return sorted(set.intersection(*(set(self.by_seed.get((task, arm), {})) for arm in arms)))

    def values(self, task: str, arm: str, metric: str, *others: str) -> list[float]:
        """A metric by seed, of the seeds that ``others`` have as well."""
        return [self.by_seed[task, arm][seed][metric] for seed in self.seeds(task, arm, *others)]

    def pair(self, metric: str, arm: str, other: str) -> dict[str, tuple[float, float]]:
        """Means of two arms by task, over the seeds that both have; tasks that lack them are left out."""
        return {
            task: (fmean(self.values(task, arm, metric, other)), fmean(self.values(task, other, metric, arm)))
            for task in self.tasks
            if self.seeds(task, arm, other)
        }

    def summary(self) -> dict[str, Any]:
        """Mean, least and greatest over seeds by task, arm and metric."""
        found: dict[str, Any] = {}
        for (task, arm), seeds in sorted(self.by_seed.items()):
            columns = {name: [figures[name] for figures in seeds.values()] for name in (*METRICS, "seconds")}
            found.setdefault(task, {})[arm] = {"seeds": sorted(seeds)} | {
                name: {"mean": fmean(column), "least": min(column), "greatest": max(column)}
                for name, column in columns.items()
            }
        return found


def table(summary: dict[str, Any]) -> str:
    """Mean over seeds and, in brackets, the least and the greatest; then means over the tasks that all arms have."""
    arms = [arm for arm in TITLES if any(arm in found for found in summary.values())]
    rows = []
    for task in (task for task in NAMES if task in summary):
        for arm in (arm for arm in arms if arm in summary[task]):
            cells = [_cell(metric, summary[task][arm][metric], task) for metric in COLUMNS]
            rows.append([NAMES[task], TITLES[arm], str(len(summary[task][arm]["seeds"])), *cells])
    shared = [task for task in summary if all(arm in summary[task] for arm in arms)]
    for arm in arms if shared else []:
        means = {metric: fmean(summary[task][arm][metric]["mean"] for task in shared) for metric in COLUMNS}
        cells = ["" if metric == "mcc" else _number(metric, mean) for metric, mean in means.items()]
        rows.append([f"**mean of {len(shared)}**", TITLES[arm], "", *cells])
    return markdown(["task", "arm", "seeds", *COLUMNS.values()], rows)


def _cell(metric: str, figures: dict[str, float], task: str) -> str:
    if metric == "mcc" and task != "cola":
        return ""
    mean, least, greatest = (_number(metric, figures[key]) for key in ("mean", "least", "greatest"))
    return f"{mean} ({least} to {greatest})"


def _number(metric: str, figure: float) -> str:
    if metric == "accuracy":
        return f"{100 * figure:.1f}"
    return f"{figure:.0f}" if metric == "seconds" else f"{figure:.3f}"


def verdicts(figures: Figures) -> list[dict[str, Any]]:
    """Each target, what was found, and whether it is met; a target without figures is left out."""
    plain, scaled = figures.pair("nll", "svi", "mle"), figures.pair("nll", "svi", "mle+temperature")
    if not plain:
        return []
    ratio, ratio_scaled = (_ratio_of_means(pairs) for pairs in (plain, scaled))
    below = [NAMES[task] for task, (svi, other) in scaled.items() if svi < other]
    errors = {task: fmean(figures.values(task, "svi", "ece_15")) for task in plain}
    changes = {task: svi - mle for task, (svi, mle) in figures.pair("accuracy", "svi", "mle").items()}
    judged = {task: change for task, change in changes.items() if task not in NOT_LEARNED}
    listed = ", ".join(f"{NAMES[task]} {100 * change:+.1f}" for task, change in changes.items())
    return [
        {
            "target": f"SVI's NLL is at most {LARGEST_NLL_RATIO} of plain LoRA's, on average over tasks",
            "found": f"{_means(plain)}: a ratio of {ratio:.2f}",
            "met": ratio <= LARGEST_NLL_RATIO,
        },
        {
            "target": "SVI's NLL is at most 5 % above that of temperature-scaled LoRA, on average over tasks",
            "found": f"{_means(scaled)}: {100 * (ratio_scaled - 1):+.1f} %",
            "met": ratio_scaled <= LARGEST_NLL_RATIO_TO_SCALED,
        },
        {
            "target": f"SVI's NLL is below that of temperature-scaled LoRA on {TASKS_BELOW_SCALED} tasks of 4",
            "found": f"{len(below)} of {len(scaled)}" + (f" ({', '.join(below)})" if below else ""),
            "met": len(below) >= TASKS_BELOW_SCALED,
        },
        {
            "target": f"SVI's ECE-15 is at most {LARGEST_ECE}, on average over tasks",
            "found": f"{fmean(errors.values()):.3f} ("
            + ", ".join(f"{NAMES[task]} {error:.3f}" for task, error in errors.items())
            + ")",
            "met": fmean(errors.values()) <= LARGEST_ECE,
        },
        {
            "target": "SVI's accuracy is at most one point below plain LoRA's on every task that is learned "
            f"({', '.join(NAMES[task] for task in NOT_LEARNED)} is not)",
            "found": f"change in points: {listed}",
            "met": all(change >= -LARGEST_LOSS_OF_ACCURACY for change in judged.values()),
        },
    ]


def _ratio_of_means(pairs: dict[str, tuple[float, float]]) -> float:
    return fmean(first for first, _ in pairs.values()) / fmean(second for _, second in pairs.values())


def _means(pairs: dict[str, tuple[float, float]]) -> str:
    first, second = (fmean(pair[place] for pair in pairs.values()) for place in (0, 1))
    return f"{first:.3f} against {second:.3f}"


def report(options: Namespace) -> None:
    """Print the table and the verdicts, and write the figures that are kept."""
    records = read_runs(options.output)
    figures = Figures(records)
    summary, judged = figures.summary(), verdicts(figures)
    names = {Run(**record["run"]).name for record in records}
    missing = [run.name for run in plan(tuple(TRAIN_SIZES), (0, 1, 2), tuple(ARMS)) if run.name not in names]
    print(table(summary), end="\n\n")
    for verdict in judged:
        print(f"- {'met' if verdict['met'] else 'NOT met'}: {verdict['target']}. Found: {verdict['found']}.")
    if missing:
        print(f"\nMissing ({len(missing)} runs, the figures above are without them): {', '.join(missing)}.")
    differing = ("task", "backend", "seed", "train_size")
    protocol = {key: item for key, item in records[0]["run"].items() if key not in differing}
    kept = {
        "protocol": protocol | {"train_size": TRAIN_SIZES},
        "environment": records[0]["environment"],
        "summary": summary,
        "verdicts": judged,
        "missing": missing,
        "runs": [_figures_of(record) for record in records],
    }
    write_json(options.results, kept)
    print(f"\nWrote {options.results}.")
    if figure(options.output, figures, options.figure):
        print(f"Wrote {options.figure}.")


def _figures_of(record: dict[str, Any]) -> dict[str, Any]:
    run = record["run"]
    return {
        "task": run["task"],
        "backend": run["backend"],
        "seed": run["seed"],
        "temperature": record["temperature"],
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "arms": {arm: {name: value(record, arm, name) for name in METRICS} for arm in record["arms"]},
    }


def figure(output: Path, figures: Figures, path: Path) -> bool:
    """Reliability diagrams of plain LoRA and SVI, the rows of all seeds of a task together."""
    from reliability import draw

    seeds = {task: figures.seeds(task, "mle", "svi") for task in figures.tasks}
    panels = {
        NAMES[task]: {
            TITLES[arm]: [output / Run(task, arm, seed, 0).name / f"{arm}.safetensors" for seed in found]
            for arm in ("mle", "svi")
        }
        for task, found in seeds.items()
        if found
    }
    if panels:
        draw(panels, path)
    return bool(panels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run or report."""
    parser, running = command_line("Accuracy and calibration of SVI against plain LoRA.", "quality", report, FIGURE)
    running.add_argument("--tasks", nargs="+", choices=TRAIN_SIZES, default=list(TRAIN_SIZES))
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    running.add_argument("--backends", nargs="+", choices=ARMS, default=list(ARMS))
    running.set_defaults(do=lambda options: work(plan(options.tasks, options.seeds, options.backends), options))
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
