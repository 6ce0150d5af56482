"""What the settings of the prior and the guide do: SVI on SST-2 with one of them changed at a time.

    python benchmarks/settings.py run --base sentence-transformers/all-MiniLM-L6-v2 --threads 1
    python benchmarks/settings.py report

The protocol is that of quality.py (1,000 rows, 10 epochs, the last epoch, seed 0), but judged on 1,000 other training
rows, so that defaults may be chosen by it. A run with MiniLM takes two to four minutes on one core. The report
prints a table and writes benchmarks/results/settings.json, from which the docstrings of the settings quote.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from common import SETTINGS, TRAIN_SIZES, Run, command_line, markdown, read_runs, value, work

from bayeslora.files import write_json

TASK = "sst2"
COLUMNS = {"accuracy": "accuracy", "nll": "NLL", "ece_15": "ECE-15"}
#: Changes of the Pyro model and of the backend by variant; plain LoRA stands beside them.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "scale-0.3": ({"scale": 0.3}, {}),
    "scale-1": ({"scale": 1.0}, {}),
    "scale-2": ({"scale": 2.0}, {}),
    "eps-0.3": ({"eps": 0.3}, {}),
    "scale-3-eps-0.33": ({"scale": 3.0, "eps": 1 / 3}, {}),
    "centre-zero": ({"centre": "zero"}, {}),
    "sites-both": ({"sites": "both"}, {}),
    "weight-scale-0.1": ({"weight_scale": 0.1}, {}),
    "four-draws-a-step": ({}, {"batch_size": 8, "gradient_accumulation_steps": 4}),
    "paper": ({"prior": "paper"}, {}),
    "learn-eps": ({"learn_eps": True}, {}),
    "learn-eps-0.1": ({"learn_eps": True, "eps": 0.1}, {}),
    "learn-eps-0.1-kl-warmup": ({"learn_eps": True, "eps": 0.1}, {"kl_warmup": 0.5}),
    "kl-warmup": ({}, {"kl_warmup": 0.5}),
    "temperature-0.1": ({}, {"temperature": 0.1}),
    "gaussian": ({"name": "gaussian"}, {}),
    "gaussian-entry": ({"name": "gaussian", "noise": "entry"}, {}),
}


def plan(names: Sequence[str]) -> list[Run]:
    """Plain LoRA, MAP, and SVI with each variant."""
    common: dict[str, Any] = {"seed": 0, "train_size": TRAIN_SIZES[TASK], "heldout_size": 1000, "split": "heldout"}
    variants = [
        Run(TASK, "svi", variant=variant, program=program, settings=SETTINGS["svi"] | settings, **common)
        for variant, (program, settings) in ((name, VARIANTS[name]) for name in names)
    ]
    return [Run(TASK, "mle", **common), Run(TASK, "map", **common), *variants]


def report(options: Namespace) -> None:
    """Print the table and write the figures that are kept."""
    rows, kept = [], {}
    for record in read_runs(options.output):
        run, arm = record["run"], record["run"]["backend"]
        name = run["variant"] or {"mle": "plain LoRA", "map": "MAP"}[arm]
        figures = {metric: value(record, arm, metric) for metric in COLUMNS}
        kept[name] = figures | {"program": run["program"], "settings": run["settings"]}
        rows.append([name, *(f"{figure:.3f}" for figure in figures.values())])
    print(markdown(["variant", *COLUMNS.values()], rows))
    write_json(options.results, {"task": TASK, "variants": kept})


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser, running = command_line("What the settings of the prior and the guide do.", "settings", report)
    running.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    running.set_defaults(do=lambda options: work(plan(options.variants), options))
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
