"""Accuracy and calibration of Bayesian LoRA on a causal language model: prompted classes and choices among texts.

    python benchmarks/language_study.py run --base FOLDER --threads 1
    python benchmarks/language_study.py report

LoRA of rank 8 on queries and values, 100 or 150 training rows a task and 60 more held back, 3 epochs in batches of 4,
the last epoch, seeds 0 and 1. Figures are of the first rows of the validation split, on which nothing is chosen. Each
arm has the learning rate, of those that are tried, at which it predicts the held-back rows of SST-2 best (NLL, seed 0),
`svi` one of B, and `map` that of plain LoRA. A temperature, and a prior that says so, are fitted on held-back rows.
`laplace` is laid around plain LoRA as it is, with an isotropic prior around zero for A and B, as in epochs.py. That
choices are scored by byte was chosen by the accuracy of the network as it comes, on 256 training rows (by token, by
byte: OpenBookQA .281, .305; ARC-Easy .457, .461). After OpenBookQA the same posteriors predict rows of other tasks.
Standard errors are of the difference from plain LoRA, by resampling rows.

What is finished is not repeated, and the report works on the runs that are there: it prints tables and verdicts, and
writes benchmarks/results/language_study.json. With SmolLM2-135M a fit takes one to three minutes on one CPU core, and
so do predictions of 150 rows by draws or by `laplace`.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
from common import Run, command_line, markdown, read_runs, work
from language_cells import RATE, SHIFTS, STUDIES, measured, run_of, task_of

from bayeslora.files import write_json
from bayeslora.predict import metrics
from bayeslora.predict.prediction import ClassPrediction, Prediction

#: Learning rates that are tried for each backend that trains, of `svi` those of B; `laplace` is laid around plain LoRA
#: at each of its own.
RATES = {"mle": (3e-4, 1e-3, 3e-3), "laplace": (3e-4, 1e-3, 3e-3), "svi": (5e-3, 1e-2, 2e-2)}
#: The task and the seed on which they are.
RATES_ON = ("sst2", 0)
ARMS = {
    "zero-shot": "before training",
    "mle": "plain LoRA (`mle`)",
    "mle+temperature": "plain LoRA, temperature fitted on 60 more rows",
    "map": "`map`, the mode under `svi`'s prior",
    "svi": "`svi`, 5 draws",
    "laplace": "`laplace`, prior by the evidence",
    "laplace+heldout": "`laplace`, prior by 60 more rows",
}
BLOCKS = {"nll": "NLL", "ece_15": "ECE (15 bins)", "accuracy": "accuracy, %"}
LARGEST_LOSS = 0.01
RESAMPLES = 500
SHARED = ("base", "epochs", "batch_size", "heldout_size", "samples", "rank", "lora_alpha", "precision", "split")

#: Predictions by arm, one a seed.
Arms = Mapping[str, Sequence[ClassPrediction]]


def heldout_losses(arm: str, output: Path) -> dict[float, float]:
    """NLL of held-back rows by learning rate."""
    backend = arm.partition("+")[0]
    runs = [run_of(*RATES_ON, backend, rate, RATE) for rate in RATES[backend]]
    found = {run.learning_rate: output / f"{run.name}.json" for run in runs}
    return {
        rate: float(json.loads(path.read_text(encoding="utf-8"))["arms"][arm]["nll"]["value"])
        for rate, path in found.items()
        if path.exists()
    }


def chosen(arm: str, output: Path) -> float:
    """The learning rate at which an arm predicts held-back rows best."""
    if arm == "zero-shot":
        return 0.0
    losses = heldout_losses("mle" if arm == "map" else arm, output)
    return min(losses, key=lambda rate: losses[rate])


def cells(task: str, seed: int, output: Path, arms: Sequence[str], variant: str = "") -> Iterator[Run]:
    """The runs that make some arms."""
    made = dict.fromkeys((arm.partition("+")[0], chosen(arm, output)) for arm in arms)
    for backend, rate in made:
        yield run_of(task, seed, backend, rate, variant)


def plan(tasks: Sequence[str], seeds: Sequence[int], output: Path) -> Iterator[Run]:
    """All runs, the most important first; later ones take the rates that earlier ones have chosen."""
    for backend, rates in RATES.items():
        for rate in rates:
            yield run_of(*RATES_ON, backend, rate, RATE)
    most = [arm for arm in ARMS if arm != "map"]
    for seed in seeds:
        for task in tasks:
            yield from cells(task, seed, output, most if seed == seeds[0] else most[1:])
        for shift in SHIFTS if seed == seeds[0] else ():
            yield from cells("openbookqa", seed, output, most, shift)
        for task in tasks:
            yield from cells(task, seed, output, ["map"])


def found(
    records: Sequence[Mapping[str, Any]], output: Path
) -> dict[tuple[str, str], dict[str, list[ClassPrediction]]]:
    """Predictions by task and variant, then by arm, a prediction a seed."""
    kept: dict[tuple[str, str], dict[str, list[ClassPrediction]]] = {}
    for record in records:
        run = Run(**record["run"])
        if run.variant != RATE:
            arms = kept.setdefault((task_of(run), run.variant), {})
            for arm in record["arms"]:
                if run.learning_rate != chosen(arm, output):
                    continue
                loaded = Prediction.load(output / run.name / f"{arm}.safetensors")
                arms.setdefault(arm, []).append(cast("ClassPrediction", loaded))
    return kept


def figures(predictions: Sequence[ClassPrediction]) -> dict[str, float]:
    """Metrics, means over seeds."""
    by_seed = [found.metrics(intervals=False) for found in predictions]
    return {metric: fmean(each[metric].value for each in by_seed) for metric in BLOCKS}


def differences(arms: Arms, arm: str) -> dict[str, tuple[float, float]]:
    """How much more than plain LoRA's each metric is, and the standard error, of the seeds that both have."""
    pairs = list(zip(arms["mle"], arms[arm], strict=False))
    labels = pairs[0][0].labels
    assert labels is not None
    known = labels.numpy()
    tables = [tuple(each.probabilities.numpy() for each in pair) for pair in pairs]
    draw = np.random.default_rng(0)
    samples = [np.arange(len(known)), *(draw.integers(len(known), size=len(known)) for _ in range(RESAMPLES))]
    measures = {"nll": metrics.nll, "ece_15": metrics.ece, "accuracy": metrics.accuracy}
    by_sample = {
        name: [
            fmean(of(other[rows], known[rows]) - of(plain[rows], known[rows]) for plain, other in tables)
            for rows in samples
        ]
        for name, of in measures.items()
    }
    return {name: (values[0], float(np.std(values[1:], ddof=1))) for name, values in by_sample.items()}


def table(kept: Mapping[tuple[str, str], Arms]) -> str:
    """A block a metric, a row an arm."""
    tasks = [task for task in STUDIES if (task, "") in kept]
    rows = []
    for metric, title in BLOCKS.items():
        rows.append([f"**{title}**", *[""] * len(tasks)])
        for arm, name in ARMS.items():
            cells = [_cell(kept[task, ""], arm, metric) for task in tasks]
            if any(cells):
                rows.append([name, *cells])
    return markdown(["", *(STUDIES[task].name for task in tasks)], rows)


def _cell(arms: Arms, arm: str, metric: str) -> str:
    if arm not in arms:
        return ""
    figure = figures(arms[arm])[metric]
    return f"{100 * figure:.1f}" if metric == "accuracy" else f"{figure:.3f}"


def shift_table(kept: Mapping[tuple[str, str], Arms]) -> str:
    """Rows of other tasks than the one that was trained on."""
    rows = [
        [title, name, *(_cell(kept["openbookqa", shift], arm, metric) for metric in BLOCKS)]
        for shift, (title, _, _) in SHIFTS.items()
        for arm, name in ARMS.items()
        if arm in kept.get(("openbookqa", shift), {})
    ]
    return markdown(["rows of", "", *BLOCKS.values()], rows)


def verdicts(changes: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]) -> list[dict[str, Any]]:
    """Each target of `svi` and `laplace` by task, what was found, and whether it is met.

    Args:
        changes: from plain LoRA, with standard errors, by task, arm and metric.
    """
    judged = []
    for arm in ("svi", "laplace"):
        for metric, target in (
            ("accuracy", "accuracy no more than a point below plain LoRA's"),
            ("nll", "NLL below plain LoRA's"),
            ("ece_15", "ECE-15 below plain LoRA's"),
        ):
            by_task = {task: arms[arm][metric] for task, arms in changes.items() if arm in arms}
            listed = ", ".join(
                f"{STUDIES[task].name} {change:+.3f} ± {error:.3f}" for task, (change, error) in by_task.items()
            )
            met = all(change >= -LARGEST_LOSS if metric == "accuracy" else change < 0 for change, _ in by_task.values())
            judged.append({"target": f"{arm}: {target}", "found": listed, "met": met})
    return judged


def report(options: Namespace) -> None:
    """Print tables and verdicts, and write the figures that are kept."""
    records = read_runs(options.output)
    kept = found(records, options.output)
    changes = {
        key: {arm: differences(arms, arm) for arm in arms if arm not in ("mle", "zero-shot")}
        for key, arms in kept.items()
        if "mle" in arms
    }
    judged = verdicts({task: arms for (task, variant), arms in changes.items() if not variant})
    print(table(kept), end="\n\n")
    if any(variant for _, variant in kept):
        print(shift_table(kept), end="\n\n")
    for verdict in judged:
        print(f"- {'met' if verdict['met'] else 'NOT met'}: {verdict['target']}. Found: {verdict['found']}.")
    rates = {arm: heldout_losses(arm, options.output) for arm in ARMS if arm not in ("zero-shot", "map")}
    protocol = {task: asdict(study) for task, study in STUDIES.items()}
    runs = [
        {key: record["run"][key] for key in ("task", "backend", "seed", "learning_rate", "variant")}
        | {"arms": {arm: {name: float(each[name]["value"]) for name in BLOCKS} for arm, each in record["arms"].items()}}
        | {key: record[key] for key in ("temperature", "seconds") if key in record}
        for record in records
    ]
    named = [
        {"task": task, "variant": variant, "arm": arm, "change": change}
        for (task, variant), arms in changes.items()
        for arm, change in arms.items()
    ]
    shared = {key: records[0]["run"][key] for key in SHARED}
    write_json(
        options.results,
        {"protocol": shared | {"tasks": protocol}, "environment": records[0]["environment"], "rates": rates}
        | {"verdicts": judged, "changes": named, "runs": runs},
    )
    print(f"\nWrote {options.results}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run or report."""
    parser, running = command_line("Bayesian LoRA on a causal language model.", "language_study", report)
    running.add_argument("--tasks", nargs="+", choices=STUDIES, default=list(STUDIES))
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    running.set_defaults(do=lambda options: work(plan(options.tasks, options.seeds, options.output), options, measured))
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
