"""How much SVI and plain LoRA depend on the learning rate: MRPC over five of them.

    python benchmarks/robustness.py run --base sentence-transformers/all-MiniLM-L6-v2 --threads 1
    python benchmarks/robustness.py report

The protocol is that of quality.py: 1,000 rows, 10 epochs, the last epoch, seed 0. With MiniLM a run takes a few minutes
on one CPU core, and there are ten; the same command in several terminals shares them. The report takes seconds and
writes benchmarks/results/robustness.json: over the grid the median, the spread (best less worst), the interquartile
range, and the measures of MonteCLoRA's authors: intrinsic robustness 1 / median NLL, extrinsic robustness the median
accuracy (TMLR 2025). The shape of the noise keeps its own learning rate, which is not varied, and B and the head have
none below 2e-3 under SVI (`SVI.point_learning_rate`).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import (
    METRICS,
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

TASK = "mrpc"
BACKENDS = ("mle", "svi")
LEARNING_RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)


def plan(rates: Sequence[float] = LEARNING_RATES) -> list[Run]:
    """Every learning rate with every backend."""
    size = TRAIN_SIZES[TASK]
    return [
        Run(TASK, backend, 0, size, learning_rate=rate, settings=dict(SETTINGS.get(backend, {})))
        for rate in rates
        for backend in BACKENDS
    ]


def spread(figures: Sequence[float]) -> dict[str, float]:
    """Median, best less worst in absolute value, and interquartile range of one metric over the grid."""
    low, median, high = np.quantile(figures, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "spread": max(figures) - min(figures), "iqr": high - low}


def summarise(grid: dict[float, dict[str, float]]) -> dict[str, Any]:
    """The measures of one arm, from its metrics by learning rate."""
    accuracy, nll = (spread([figures[metric] for figures in grid.values()]) for metric in ("accuracy", "nll"))
    return {
        "accuracy": accuracy,
        "nll": nll,
        "intrinsic": 1 / nll["median"],
        "extrinsic": accuracy["median"],
        "learning_rates": sorted(grid),
    }


def report(options: Namespace) -> None:
    """Print both tables and write the figures that are kept."""
    records = read_runs(options.output)
    grids: dict[str, dict[float, dict[str, float]]] = {}
    for record in records:
        for arm in record["arms"]:
            figures = {metric: value(record, arm, metric) for metric in (*METRICS, "seconds")}
            grids.setdefault(arm, {})[record["run"]["learning_rate"]] = figures
    arms = [arm for arm in TITLES if arm in grids]
    rates = sorted({rate for grid in grids.values() for rate in grid})
    summary = {arm: summarise(grids[arm]) for arm in arms}
    print("Accuracy / NLL by learning rate:\n")
    print(
        markdown(
            ["arm", *(f"{rate:g}" for rate in rates)],
            [[TITLES[arm], *(_cell(grids[arm].get(rate)) for rate in rates)] for arm in arms],
        )
    )
    print("\nOver learning rates:\n")
    print(
        markdown(
            ["arm", "median accuracy (extrinsic)", "spread", "IQR", "median NLL", "spread", "IQR", "intrinsic"],
            [[TITLES[arm], *_measures(summary[arm])] for arm in arms],
        )
    )
    names = {Run(**record["run"]).name for record in records}
    missing = [run.name for run in plan() if run.name not in names]
    if missing:
        print(f"\nMissing ({len(missing)} runs, the figures above are without them): {', '.join(missing)}.")
    differing = ("backend", "learning_rate")
    kept = {
        "protocol": {key: item for key, item in records[0]["run"].items() if key not in differing},
        "environment": records[0]["environment"],
        "summary": summary,
        "missing": missing,
        "runs": {arm: [{"learning_rate": rate} | grids[arm][rate] for rate in sorted(grids[arm])] for arm in arms},
    }
    write_json(options.results, kept)
    print(f"\nWrote {options.results}.")


def _cell(figures: dict[str, float] | None) -> str:
    return "" if figures is None else f"{100 * figures['accuracy']:.1f} / {figures['nll']:.3f}"


def _measures(found: dict[str, Any]) -> list[str]:
    accuracy = [f"{100 * found['accuracy'][name]:.1f}" for name in ("median", "spread", "iqr")]
    nll = [f"{found['nll'][name]:.3f}" for name in ("median", "spread", "iqr")]
    return [*accuracy, *nll, f"{found['intrinsic']:.2f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run or report."""
    title = "How much SVI and plain LoRA depend on the learning rate."
    parser, running = command_line(title, "robustness", report)
    running.add_argument("--learning-rates", nargs="+", type=float, default=list(LEARNING_RATES))
    running.set_defaults(do=lambda options: work(plan(options.learning_rates), options))
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
