"""What few draws cost: a posterior's accuracy, NLL and ECE by the number of draws, independent ones and pairs.

    python benchmarks/draws.py RUN... --threads 1

RUN is the folder of a fit, such as runs/own_settings/cells/NAME of a study. The first 400 rows of its task's validation
split are predicted under 64 independent draws and under 32 pairs, which are kept and not made again; groups that have
no draw in common stand for predictions by fewer. Ten minutes a fit with MiniLM on one CPU core. Prints a Markdown table
of means over groups and the standard deviations between them, and writes benchmarks/results/draws.json.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from common import RESULTS, environment, markdown

import bayeslora as bl
from bayeslora.app import runs
from bayeslora.files import write_json
from bayeslora.predict.prediction import ClassPrediction

METRICS = {"accuracy": "accuracy", "nll": "NLL", "ece_15": "ECE-15"}
DRAWS = 64
SIZES = (2, 4, 10, 16, 32, 64)
METHODS = {"sample": "independent", "pairs": "pairs"}


def predicted(run: Path, method: str, options: Namespace) -> ClassPrediction:
    """All draws of a fit, made or found."""
    kept = options.output / f"{run.name}-{method}.safetensors"
    if not kept.exists():
        posterior = bl.load(run, base=options.base)
        rows = runs.saved_task(posterior, None, options.data_dir, {}).split("validation")
        rows = rows.select(list(range(min(options.rows, len(rows)))))
        posterior.predict(rows, options.draws, method, seed=options.seed).save(kept)
    return ClassPrediction.load(kept)


def groups(prediction: ClassPrediction, size: int) -> Iterator[ClassPrediction]:
    """Predictions by so many draws each, none of which two have in common."""
    for first in range(0, len(prediction.outputs) - size + 1, size):
        yield replace(prediction, outputs=prediction.outputs[first : first + size])


def by_size(prediction: ClassPrediction) -> dict[str, dict[str, dict[str, float]]]:
    """Of each number of draws each metric's mean over groups, and standard deviation between them."""
    found = {}
    for size in (size for size in SIZES if size <= len(prediction.outputs)):
        metrics = [each.metrics(intervals=False) for each in groups(prediction, size)]
        values = {name: [each[name].value for each in metrics] for name in METRICS}
        found[str(size)] = {
            name: {"mean": fmean(each)} | ({"deviation": stdev(each)} if len(each) > 1 else {})
            for name, each in values.items()
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict, print the table, and write the figures that are kept."""
    parser = ArgumentParser(description="What few draws cost.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a fit")
    parser.add_argument("--base", help="folder or hub name of the base network, if it has moved")
    parser.add_argument("--data-dir", help="folder of the task's files, if they have moved")
    parser.add_argument("--rows", type=int, default=400, help="the first ones of the validation split")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--threads", type=int, default=1, help="threads of this process")
    parser.add_argument("--output", type=Path, default=Path("runs") / "draws", help="where predictions are kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "draws.json", help="figures that are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("medium")  # as studies have it, whose fits these are
    rows: list[list[str]] = []
    kept: dict[str, Any] = {}
    for run, (method, title) in product(options.runs, METHODS.items()):
        found = by_size(predicted(run, method, options))
        kept.setdefault(run.name, {})[method] = found
        rows += [[run.name, title, size, *_cells(figures)] for size, figures in found.items()]
    print(markdown(["fit", "draws", "number", *METRICS.values()], rows))
    protocol: dict[str, Any] = {"draws": options.draws, "rows": options.rows, "seed": options.seed}
    write_json(options.results, {"protocol": protocol, "environment": environment(torch.device("cpu")), "fits": kept})
    print(f"\nWrote {options.results}.")


def _cells(figures: dict[str, dict[str, float]]) -> list[str]:
    return [" ± ".join(f"{value:.3f}" for value in each.values()) for each in figures.values()]


if __name__ == "__main__":
    main()
