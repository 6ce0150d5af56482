"""Families of posteriors over the same program, on two tasks: how good, and at what cost.

    python benchmarks/families.py run --base sentence-transformers/all-MiniLM-L6-v2 --threads 1
    python benchmarks/families.py report

LoRA of rank 8 on all linear layers, 1,000 training rows and 300 more held back, 10 epochs in batches of 32, the last
epoch, evaluated on the validation split with 10 draws. A family has the prior and the noise of its preset and the rates
of the library's defaults, so that what differs is the posterior; published rates are for five thousand steps of four
rows. Nothing is chosen on the validation split. The report takes seconds: a Markdown table, and
benchmarks/results/families.json. It works on the runs that are there.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from common import METRICS, TRAIN_SIZES, Run, command_line, environment, markdown, read_runs, value, work

import bayeslora as bl
from bayeslora.files import write_json
from bayeslora.inference.presets import preset
from bayeslora.models import build

TASKS = {"sst2": "SST-2", "mrpc": "MRPC"}
#: Methods: the preset that they are of, or else the backend; and the settings that are not the preset's.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mle": ("", {}),
    "map": ("", {}),
    "svi": ("", {}),
    "laplace": ("", {}),
    "bayesian-lora": ("bayesian-lora", {}),
    "blob": ("blob", {"scale_learning_rate": 1e-2}),
    "scalabl": ("scalabl", {"scale_learning_rate": 1e-2}),
    "tfb": ("tfb", {}),
    "swag": ("swag-lora", {}),
    "ivon": ("ivon-lora", {}),
    "c-lora": ("c-lora", {}),
}
#: What all families that are trained by AdamW have in common, whatever their preset says.
SAME = {"epochs": 10.0, "batch_size": 32, "max_grad_norm": 1.0}
#: Rates that a preset has for other numbers of steps and rows.
RATES = ("learning_rate", "point_learning_rate")


def plan(tasks: Sequence[str], seeds: Sequence[int], families: Sequence[str]) -> list[Run]:
    """All runs, the families of one task and seed after one another."""
    return [
        Run(task, family, seed, TRAIN_SIZES[task], learning_rate=0.0)
        for seed in seeds
        for task in tasks
        for family in families
    ]


def measured(run: Run, base: str, data_dir: str | None, output: Path) -> dict[str, Any]:
    """Fit one family, and evaluate its prediction."""
    from peft import LoraConfig

    task = bl.load_task(run.task, data_dir, train_size=run.train_size, heldout_size=run.heldout_size, seed=run.seed)
    rows = task.split(run.split)
    lora = LoraConfig(r=run.rank, lora_alpha=run.lora_alpha, target_modules="all-linear")
    model, backend = parts(run.backend)
    program = bl.Program.from_pretrained(base, task, lora=lora, model=model, seed=run.seed)
    posterior = bl.fit(program, task.train, backend, seed=run.seed, progress=False, heldout=task.heldout)
    start = time.perf_counter()
    prediction = posterior.predict(rows, draws=run.samples, seed=run.seed, progress=False)
    predicted = time.perf_counter() - start
    return {
        "run": asdict(run),
        "arms": {run.backend: prediction.metrics().to_dict()},
        "seconds": {"fit": posterior.cost["seconds"], "predict": predicted},
        "peak_memory_bytes": posterior.cost["peak_memory_bytes"],
        "parameters": posterior.cost["parameters"],
        "extra_parameters": posterior.cost["extra_parameters"],
        "settings": posterior.record.settings,
        "environment": environment(program.device),
    }


def parts(family: str) -> tuple[Any, Any]:
    """The model of the weights and the backend of a family."""
    from bayeslora.inference import BACKENDS

    name, settings = FAMILIES[family]
    if not name:
        algorithm = BACKENDS[family.partition(",")[0]]
        model, given = getattr(algorithm, "default_model", ("monteclora", {}))
        return build(model, **given), algorithm(**SAME, **settings)
    found = preset(name)
    known = BACKENDS[found.backend].__dataclass_fields__
    default = {rate: known[rate].default for rate in RATES if rate in known and rate in found.settings}
    same = {key: item for key, item in SAME.items() if key in known}
    return found.build_model(), found.build_backend(**same, **default, **settings)


def report(options: Namespace) -> None:
    """Print the table and write the figures that are kept."""
    records = read_runs(options.output)
    summary = [_summary(task, family, records) for task in TASKS for family in FAMILIES]
    rows = [row for row in summary if row["seeds"]]
    print(table(rows))
    kept = {
        "protocol": {key: item for key, item in records[0]["run"].items() if key not in ("task", "backend", "seed")},
        "environment": records[0]["environment"],
        "summary": rows,
        "settings": {record["run"]["backend"]: record["settings"] for record in records},
    }
    write_json(options.results, kept)
    print(f"\nWrote {options.results}.")


def _summary(task: str, family: str, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    found = [record for record in records if (record["run"]["task"], record["run"]["backend"]) == (task, family)]
    row: dict[str, Any] = {"task": task, "family": family, "seeds": sorted(record["run"]["seed"] for record in found)}
    if found:
        row |= {metric: fmean(value(record, family, metric) for record in found) for metric in METRICS}
        row |= {f"{phase}_seconds": fmean(each["seconds"][phase] for each in found) for phase in ("fit", "predict")}
        row |= {key: fmean(each[key] for each in found) for key in ("peak_memory_bytes", "extra_parameters")}
    return row


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Means over seeds; seconds depend on the processor, and on what else it does."""
    cells = [
        [
            TASKS[row["task"]],
            row["family"],
            str(len(row["seeds"])),
            f"{100 * row['accuracy']:.1f}",
            f"{row['nll']:.3f}",
            f"{row['ece_15']:.3f}",
            f"{row['extra_parameters']:,.0f}",
            f"{row['fit_seconds']:.0f}",
            f"{row['predict_seconds']:.0f}",
        ]
        for row in rows
    ]
    head = [
        "task",
        "family",
        "seeds",
        "accuracy, %",
        "NLL",
        "ECE-15",
        "parameters more than LoRA",
        "fit, s",
        "predict, s",
    ]
    return markdown(head, cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run or report."""
    parser, running = command_line("Families of posteriors over the same program.", "families", report)
    running.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    running.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    running.set_defaults(
        do=lambda options: work(plan(options.tasks, options.seeds, options.families), options, measured)
    )
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
