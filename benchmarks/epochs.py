"""Laplace's approximation along a fit that overfits: plain LoRA at several epochs, and a Gaussian around each.

    python benchmarks/epochs.py run --base sentence-transformers/all-MiniLM-L6-v2 --threads 1
    python benchmarks/epochs.py report

After figure 1 of Yang et al. (ICLR 2024): plain LoRA (`mle`) of rank 8 on all linear layers, 1,000 training rows (CoLA
2,000, OpenBookQA 500), 10 epochs, seeds 0 to 2. Its checkpoints are taken as given by `laplace`, with the same training
rows and an isotropic prior around zero for A and B, whose width is tuned by the evidence, in the arm "as published" by
that of the paper (`tune="mode-evidence"`). Nothing is chosen on the validation split; the temperature of plain LoRA,
and the width of the prior in the arm that says so, on 300 training rows that were held back. Widths and links share one
pass over the rows that are predicted. After the last epoch the same posteriors predict rows of other tasks or domains:
how well, and how well uncertainty tells them from the validation split (AUROC). A run with MiniLM takes ten minutes on
one CPU core, OpenBookQA twice that; processes share the runs. The report prints tables and verdicts, and writes
benchmarks/results/epochs.json and docs/images/epochs.png.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from common import RESULTS, Run, command_line, environment, markdown, read_runs, work
from epoch_parts import CURVES, LAST, Fitted, metrics_of, shifted
from safetensors.torch import load_file

import bayeslora as bl
from bayeslora.files import write_json
from bayeslora.inference.variational.posterior import VariationalPosterior

FIGURE = RESULTS.parent.parent / "docs" / "images" / "epochs.png"
#: Training rows of each task.
SIZES = {"mrpc": 1000, "sst2": 1000, "cola": 2000, "rte": 1000, "openbookqa": 500}
NAMES = {"mrpc": "MRPC", "sst2": "SST-2", "cola": "CoLA", "rte": "RTE", "openbookqa": "OpenBookQA"}
#: At 1,000 rows plain LoRA is hardly better than guessing on RTE, so a point of accuracy there says nothing.
NOT_LEARNED = ("rte",)
METRICS = ("accuracy", "mcc", "nll", "brier", "ece_10", "ece_15", "ece_20", "ece_adaptive")
#: Epochs at which a Gaussian is laid around the weights.
EPOCHS = (1, 3, 5, 10)
COLUMNS = {"accuracy": "accuracy", "nll": "NLL", "brier": "Brier", "ece_15": "ECE-15"}
SHIFT_COLUMNS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece_15": "ECE-15",
    "auroc_entropy": "AUROC, entropy",
    "auroc_information": "AUROC, information",
}
#: Of the picture; the colour-blind tell the colours apart (Okabe and Ito).
COLOURS, INK = ("#D55E00", "#0072B2", "#009E73"), "#333333"
#: Of its lines, in the order of `CURVES`.
WIDTHS = (4.0, 3.2, 2.4, 1.8, 1.0)
LARGEST_ECE_RATIO, OVERFITTED, LARGEST_NLL_RATIO, LARGEST_CHANGE = 1 / 3, 1.0, 0.5, 0.005


def measured(run: Run, model: str, data_dir: str | None, output: Path) -> dict[str, Any]:
    """Train plain LoRA, and evaluate it and its approximations epoch by epoch."""
    from peft import LoraConfig

    task = bl.load_task(run.task, data_dir, train_size=run.train_size, heldout_size=run.heldout_size, seed=run.seed)
    lora = LoraConfig(r=run.rank, lora_alpha=run.lora_alpha, target_modules="all-linear")
    prior = bl.models.build("gaussian", sites="both", centre="zero", deviation=0.1, **run.program)
    program = bl.Program.from_pretrained(model, task, lora=lora, model=prior, seed=run.seed)
    last = int(run.epochs)
    by_epoch, evidence = {}, {}
    with TemporaryDirectory() as scratch:
        trained = bl.fit(
            program, task.train, "mle", seed=run.seed, progress=False, output_dir=Path(scratch) / "run",
            epochs=last, batch_size=run.batch_size, learning_rate=run.learning_rate, keep_checkpoints=last,
        )  # fmt: skip
        checkpoints = sorted((Path(scratch) / "run" / "checkpoints").glob("checkpoint-*"), key=_steps)
        for epoch in sorted({min(epoch, last) for epoch in EPOCHS} | {last}):
            state = load_file(checkpoints[epoch - 1] / "model.safetensors")
            fitted = Fitted.around(VariationalPosterior.from_state(program, trained.record, state), task, run)
            arms = fitted.predict_last(task) if epoch == last else fitted.predict(task.split(run.split))
            by_epoch[epoch], evidence[epoch] = metrics_of(arms), fitted.evidence
    for arm, found in arms.items():
        found.save(output / run.name / f"{arm}.safetensors")
    return {
        "run": asdict(run),
        "arms": by_epoch[last],
        "epochs": by_epoch,
        "evidence": evidence,
        "shift": shifted(run, fitted, arms, data_dir),
        "seconds": {"fit": trained.cost["seconds"]},
        "environment": environment(program.device),
    }


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def plan(tasks: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """All runs, seed by seed."""
    return [Run(task, "laplace", seed, SIZES[task]) for seed in seeds for task in tasks]


def table(last: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    """Means over seeds at the last epoch: a block a metric, a row an arm."""
    tasks = [task for task in NAMES if (task, "mle") in last]
    rows = []
    for metric, title in COLUMNS.items():
        rows.append([f"**{title}**", *[""] * (len(tasks) + 1)])
        for arm, name in (CURVES | LAST).items():
            found = [last[task, arm][metric] for task in tasks]
            shown = [f"{100 * each:.1f}" if metric == "accuracy" else f"{each:.3f}" for each in (*found, fmean(found))]
            rows.append([name, *shown])
    return markdown(["last epoch", *(NAMES[task] for task in tasks), "mean"], rows)


def shift_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds on rows of other tasks and domains."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        for title, arms in record["shift"].items():
            for arm, metrics in arms.items():
                found.setdefault((NAMES[record["run"]["task"]], title, arm), []).append(metrics)
    rows = []
    for (task, title, arm), seeds in found.items():
        figures = {name: fmean(float(metrics[name]["value"]) for metrics in seeds) for name in SHIFT_COLUMNS}
        cells = [f"{100 * each:.1f}" if name == "accuracy" else f"{each:.3f}" for name, each in figures.items()]
        rows.append([task, title, CURVES[arm], *cells])
    return markdown(["trained on", "rows of", "last epoch", *SHIFT_COLUMNS.values()], rows)


def verdicts(last: Mapping[tuple[str, str], Mapping[str, float]]) -> list[dict[str, Any]]:
    """Each target of Laplace's approximation at the last epoch, what was found, and whether it is met."""
    tasks = [task for task in NAMES if (task, "mle") in last]

    def of(arm: str, metric: str) -> dict[str, float]:
        return {task: last[task, arm][metric] for task in tasks}

    errors = {task: of("la", "ece_15")[task] / of("mle", "ece_15")[task] for task in tasks}
    overfitted = [task for task in tasks if of("mle", "nll")[task] > OVERFITTED]
    losses = {task: of("la", "nll")[task] / of("mle", "nll")[task] for task in overfitted}
    changes = {task: of("la", "accuracy")[task] - of("mle", "accuracy")[task] for task in tasks}
    ours, scaled = (fmean(of(arm, "nll").values()) for arm in ("la", "mle+temperature"))
    learned = [change for task, change in changes.items() if task not in NOT_LEARNED]
    return [
        _verdict("ECE-15 at most a third of plain LoRA's", errors, max(errors.values()) <= LARGEST_ECE_RATIO),
        _verdict(
            "NLL at most half of plain LoRA's where that is above 1",
            losses,
            all(ratio <= LARGEST_NLL_RATIO for ratio in losses.values()),
        ),
        _verdict(
            "accuracy within half a point of plain LoRA's on every task that is learned",
            changes,
            all(abs(change) <= LARGEST_CHANGE for change in learned),
        ),
        {
            "target": "NLL no worse than with a fitted temperature, on average over tasks",
            "found": f"{ours:.3f} against {scaled:.3f}",
            "met": ours <= scaled,
        },
    ]


def _verdict(target: str, found: Mapping[str, float], met: bool) -> dict[str, Any]:
    listed = ", ".join(f"{NAMES[task]} {figure:.3f}" for task, figure in found.items())
    return {"target": target, "found": listed, "met": met}


def report(options: Namespace) -> None:
    """Print table and verdicts, write the figures that are kept, and draw the curves."""
    records = read_runs(options.output)
    curves: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {}
    for record in records:
        for epoch, arms in record["epochs"].items():
            for arm, metrics in arms.items():
                figures = {name: float(metrics[name]["value"]) for name in METRICS}
                curves.setdefault((record["run"]["task"], arm, epoch), {})[record["run"]["seed"]] = figures
    means = {
        key: {name: fmean(each[name] for each in seeds.values()) for name in METRICS} for key, seeds in curves.items()
    }
    end = str(int(records[0]["run"]["epochs"]))
    last = {(task, arm): figures for (task, arm, epoch), figures in means.items() if epoch == end}
    judged = verdicts(last)
    seeds = Counter(NAMES[record["run"]["task"]] for record in records)
    print("Seeds:", ", ".join(f"{name} {number}" for name, number in seeds.items()), end=".\n\n")
    print(table(last), end="\n\n")
    if any(record["shift"] for record in records):
        print(shift_table(records), end="\n\n")
    for verdict in judged:
        print(f"- {'met' if verdict['met'] else 'NOT met'}: {verdict['target']}. Found: {verdict['found']}.")
    runs = [
        {"task": record["run"]["task"], "seed": record["run"]["seed"], "evidence": record["evidence"]}
        | {"epochs": {epoch: _values(arms, METRICS) for epoch, arms in record["epochs"].items()}}
        | {"shift": {title: _values(arms, SHIFT_COLUMNS) for title, arms in record["shift"].items()}}
        for record in records
    ]
    differing = ("task", "seed", "train_size")
    protocol = {key: item for key, item in records[0]["run"].items() if key not in differing} | {"train_size": SIZES}
    kept = {"protocol": protocol, "environment": records[0]["environment"], "verdicts": judged, "runs": runs}
    write_json(options.results, kept)
    draw(means, options.figure)
    print(f"\nWrote {options.results} and {options.figure}.")


def _values(arms: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, float]]:
    return {arm: {name: float(metrics[name]["value"]) for name in names} for arm, metrics in arms.items()}


def draw(means: Mapping[tuple[str, str, str], Mapping[str, float]], path: Path) -> None:
    """Accuracy, NLL and ECE by epoch, a column a task."""
    from matplotlib.figure import Figure

    from bayeslora.predict.plots import save_figure

    tasks = [task for task in NAMES if any(key[0] == task for key in means)]
    shown = {"accuracy": "accuracy", "nll": "NLL", "ece_15": "ECE (15 bins)"}
    figure = Figure(figsize=(2.7 * len(tasks) + 0.6, 6.6), dpi=160, layout="constrained")
    axes = figure.subplots(len(shown), len(tasks), sharex=True, squeeze=False)
    looks = [(COLOURS[0], "-"), (COLOURS[0], ":"), (COLOURS[1], "-"), (COLOURS[1], ":"), (COLOURS[2], "-")]
    styles = dict(zip(CURVES, looks, strict=True))
    for row, (metric, label) in zip(axes, shown.items(), strict=True):
        for axis, task in zip(row, tasks, strict=True):
            # Later lines are thinner: where arms agree, as two classes' accuracy does, every one of them is seen.
            for (arm, (colour, line)), width in zip(styles.items(), WIDTHS, strict=True):
                points = sorted(
                    (int(key[2]), figures[metric]) for key, figures in means.items() if key[:2] == (task, arm)
                )
                look = {"color": colour, "linewidth": width, "marker": ".", "markersize": 2.5 * width + 3}
                axis.plot(*zip(*points, strict=True), line, label=CURVES[arm], **look)
            axis.spines[["top", "right"]].set_visible(False)
            if metric != "accuracy":
                axis.set_ylim(bottom=0)
        row[0].set_ylabel(label, color=INK)
    for axis, task in zip(axes[0], tasks, strict=True):
        axis.set_title(NAMES[task], loc="left", fontweight="bold", color=INK)
    for axis in axes[-1]:
        axis.set_xlabel("epoch", color=INK)
    columns = len(CURVES) if len(tasks) > 3 else 2
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run or report."""
    parser, running = command_line("Laplace's approximation along a fit that overfits.", "epochs", report, FIGURE)
    running.add_argument("--tasks", nargs="+", choices=SIZES, default=list(SIZES))
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    running.set_defaults(do=lambda options: work(plan(options.tasks, options.seeds), options, measured))
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
