"""The diagnosis of MAP, SVI and Laplace on one task: k-hat by block, leave-one-out, and what probabilities are worth.

    python benchmarks/diagnosis.py run --base sentence-transformers/all-MiniLM-L6-v2 --threads 2
    python benchmarks/diagnosis.py report

LoRA of rank 8 on all linear layers, 400 training rows of MRPC, 25 epochs, the last one, seed 0; the validation split.
`laplace` has the isotropic prior around zero of Laplace-LoRA, tuned by its own evidence, and plain LoRA's weights for
its mode; the others have MonteCLoRA, whose means stay where they start. Each of 100 draws passes over the training
rows, and each of 40 for every layer of the network: a run with MiniLM takes most of an hour on one CPU core, `map` ten
minutes. Every run leaves its report beside its figures. The report prints a table and writes
benchmarks/results/diagnosis.json.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import MODEL, SETTINGS, Run, command_line, environment, markdown, read_runs, work

import bayeslora as bl
from bayeslora.files import write_json

TASK, ROWS, EPOCHS = "mrpc", 400, 25
DRAWS, BLOCK_DRAWS = 100, 40
LAPLACE = {"name": "gaussian", "sites": "both", "centre": "zero", "deviation": 0.1}
NAMES = {"map": "MAP", "svi": "SVI", "laplace": "Laplace"}


def measured(run: Run, model: str, data_dir: str | None, output: Path) -> dict[str, Any]:
    """Fit one backend, and diagnose it."""
    from peft import LoraConfig

    task = bl.load_task(run.task, data_dir, train_size=run.train_size, heldout_size=run.heldout_size, seed=run.seed)
    lora = LoraConfig(r=run.rank, lora_alpha=run.lora_alpha, target_modules="all-linear")
    weights = bl.models.build(**MODEL | run.program)
    program = bl.Program.from_pretrained(model, task, lora=lora, model=weights, seed=run.seed)
    settings = {"epochs": run.epochs, "batch_size": run.batch_size, "learning_rate": run.learning_rate}
    settings |= run.settings
    if run.backend == "laplace":
        plain = bl.fit(program, task.train, "mle", seed=run.seed, progress=False, **settings)
        # By the evidence of the linear model the best prior around a fit as exact as this one has no width at all.
        settings = {"start": plain, "tune": "mode-evidence", "batch_size": run.batch_size}
    posterior = bl.fit(program, task.train, run.backend, seed=run.seed, progress=False, **settings)
    found = bl.diagnostics.diagnose(
        posterior, task.split(run.split), task.train, draws=max(run.samples, BLOCK_DRAWS),
        block_draws=BLOCK_DRAWS if posterior.dense else 0, seed=run.seed, progress=False,
    )  # fmt: skip
    found.save(output / run.name, f"{NAMES[run.backend]} on {run.task}")
    shown = {name: {"value": found.figures[name]} for name in ("accuracy", "nll", "ece_15")}
    return {
        "run": asdict(run),
        "arms": {run.backend: shown},
        "figures": found.figures,
        "settings": posterior.record.settings,
        "seconds": {"fit": posterior.cost["seconds"]},
        "environment": environment(program.device),
    }


def plan() -> list[Run]:
    """One run for each backend."""
    return [
        Run(
            TASK,
            backend,
            0,
            ROWS,
            epochs=EPOCHS,
            samples=DRAWS,
            program=LAPLACE if backend == "laplace" else {},
            settings=dict(SETTINGS.get(backend, {})),
        )
        for backend in ("map", "svi", "laplace")
    ]


def report(options: Namespace) -> None:
    """Print the table and write the figures that are kept."""
    records = {record["run"]["backend"]: record for record in read_runs(options.output)}
    rows = []
    for backend in (name for name in NAMES if name in records):
        figures = records[backend]["figures"]
        blocks = figures.get("khat_by_block", {}).values()
        rows.append(
            [
                NAMES[backend],
                f"{figures['khat']:.2f}" if "khat" in figures else "no density",
                f"{min(blocks):.2f} to {max(blocks):.2f}" if blocks else "no density",
                f"{figures['elpd_loo']:.1f} ± {figures['elpd_loo_error']:.1f}" if "elpd_loo" in figures else "one draw",
                str(figures.get("pareto_k_bad", "")),
                f"{100 * figures['accuracy']:.1f}",
                f"{figures['nll']:.3f}",
                f"{figures['ece_15']:.3f}",
            ]
        )
    header = ["", "k-hat", "k-hat by layer", "elpd_loo", "rows with high k", "accuracy", "NLL", "ECE-15"]
    print(markdown(header, rows))
    kept = {backend: record["figures"] for backend, record in records.items()}
    first = next(iter(records.values()))
    write_json(options.results, {"protocol": first["run"], "environment": first["environment"], "figures": kept})
    print(f"\nWrote {options.results}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run or report."""
    parser, running = command_line("The diagnosis of MAP, SVI and Laplace on MRPC.", "diagnosis", report)
    running.set_defaults(do=lambda options: work(plan(), options, measured))
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
