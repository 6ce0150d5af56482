"""Little data: plain LoRA, MAP and SVI on 300 rows of SST-2, by learning rate and by how noise begins.

    python benchmarks/small.py run --base sentence-transformers/all-MiniLM-L6-v2 --threads 1
    python benchmarks/small.py report

LoRA of rank 8 on all linear layers, 8 epochs, seeds 0 to 3, judged on 800 other training rows, since defaults were
chosen by it. A run takes a minute on one CPU core. The report takes seconds: a Markdown table, and
benchmarks/results/small.json. It works on the runs that are there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from common import Run, command_line, markdown, read_runs, value, work

from bayeslora.files import write_json

SHOWN = ("accuracy", "nll", "ece_15")
#: A prior whose means stay where the model has them; of 1.5 times the size of the initial matrix, not 2.5.
HELD = {"prior_mean": "model"}
#: Backend, learning rate and settings of each variant.
VARIANTS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "mle, 3e-4": ("mle", 3e-4, {}),
    "mle, 5e-4": ("mle", 5e-4, {}),
    "mle, 1e-3": ("mle", 1e-3, {}),
    "mle, 2e-3": ("mle", 2e-3, {}),
    "map": ("map", 5e-4, {}),
    "map, held": ("map", 5e-4, HELD),
    "map, held, one rate": ("map", 5e-4, {**HELD, "point_learning_rate": 5e-4}),
    "svi": ("svi", 5e-4, {}),
    "svi, no warm-up": ("svi", 5e-4, {"noise_warmup": 0.0}),
    "svi, held": ("svi", 2e-3, HELD),
    "svi, held, no warm-up": ("svi", 2e-3, {**HELD, "noise_warmup": 0.0}),
}


def plan(names: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Every variant with every seed."""
    common: dict[str, Any] = {"train_size": 300, "heldout_size": 800, "epochs": 8.0, "split": "heldout"}
    return [
        Run(
            "sst2",
            backend,
            seed,
            learning_rate=rate,
            settings=settings,
            variant=name.replace(", ", "-"),
            program={"scale": 1.5} if "prior_mean" in settings else {},
            **common,
        )
        for seed in seeds
        for name, (backend, rate, settings) in ((name, VARIANTS[name]) for name in names)
    ]


def report(options: Namespace) -> None:
    """Print the table and write the figures that are kept."""
    records = read_runs(options.output)
    summary = []
    for name, (backend, rate, _) in VARIANTS.items():
        own = [record for record in records if record["run"]["variant"] == name.replace(", ", "-")]
        if own:
            means = {metric: fmean(value(record, backend, metric) for record in own) for metric in SHOWN}
            seeds = sorted(record["run"]["seed"] for record in own)
            summary.append({"variant": name, "learning_rate": rate, "seeds": seeds} | means)
    cells = [
        [
            row["variant"],
            str(len(row["seeds"])),
            f"{100 * row['accuracy']:.1f}",
            f"{row['nll']:.3f}",
            f"{row['ece_15']:.3f}",
        ]
        for row in summary
    ]
    print(markdown(["variant", "seeds", "accuracy, %", "NLL", "ECE-15"], cells))
    differing = ("backend", "seed", "learning_rate", "settings", "variant", "program")
    protocol = {key: item for key, item in records[0]["run"].items() if key not in differing}
    write_json(options.results, {"protocol": protocol, "environment": records[0]["environment"], "summary": summary})
    print(f"\nWrote {options.results}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run or report."""
    parser, running = command_line("Little data, by learning rate and by how noise begins.", "small", report)
    running.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    running.set_defaults(do=lambda options: work(plan(options.variants, options.seeds), options))
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
