"""How far a posterior of svi has come from its prior: its noise, its divergence, and what its draws change.

    python benchmarks/contraction.py RUN... --threads 1

RUN is the folder of a fit, such as runs/learning_rates/cells/NAME of a study. The deviations of posterior and prior are
those of 64 draws each, in each layer the root of the mean over all entries; the divergence is that of the last entry of
the log, of the random sites and what shapes their noise; and total variation is that between the probabilities of 32
draws and of the posterior mean, for the first 400 rows of the task's validation split. A minute a fit with MiniLM
on one CPU core. Prints a Markdown table, and writes benchmarks/results/contraction.json.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, markdown
from torch import Tensor

import bayeslora as bl
from bayeslora.app import runs
from bayeslora.files import write_json
from bayeslora.posterior import Posterior
from bayeslora.rng import seeded

COLUMNS = {
    "random": "random weights",
    "least": "noise / prior's, least layer",
    "median": "median",
    "most": "largest",
    "nats": "divergence, nats",
    "variation": "total variation of draws",
}


def deviations(draw: Callable[[], dict[str, Tensor]], names: Sequence[str], options: Namespace) -> dict[str, Tensor]:
    """Deviation of each layer's entries under draws (layers,), by site."""
    drawn = [draw() for _ in seeded(options.draws, options.seed, torch.device("cpu"))]
    stacked = {name: torch.stack([each[name] for each in drawn]) for name in names}
    return {name: values.var(0).flatten(1).mean(1).sqrt() for name, values in stacked.items()}


def divergence(posterior: Posterior, names: Sequence[str]) -> float:
    """Of the random sites and of what shapes their noise, by the last step that was logged, in nats."""
    last = [entry for entry in posterior.record.history if "kl_weight" in entry][-1]
    parts = [value for name, value in last.items() if name.startswith(tuple(f"kl/{each}" for each in names))]
    return sum(parts) * posterior.record.n_data


def measured(run: Path, options: Namespace) -> dict[str, Any]:
    """The figures of a fit."""
    posterior = bl.load(run, base=options.base)
    random = posterior.program.model.split(posterior.program.sites)[0]
    names = [site.name for site in random]
    own, before = (deviations(draw, names, options) for draw in (posterior.draw, posterior.prior_draw))
    ratio = torch.cat([own[name] / before[name] for name in names])
    rows = runs.saved_task(posterior, None, options.data_dir, {}).split("validation")
    rows = rows.select(list(range(min(options.rows, len(rows)))))
    drawn = posterior.predict(rows, options.draws // 2, "sample", seed=options.seed).outputs.softmax(-1)
    mean = posterior.predict(rows, method="mean").outputs.softmax(-1)
    return {
        "settings": {name: posterior.record.settings[name] for name in ("learning_rate", "epochs", "batch_size")},
        "random": sum(site.initial.numel() for site in random),
        "least": float(ratio.min()),
        "median": float(ratio.median()),
        "most": float(ratio.max()),
        "nats": divergence(posterior, names),
        "variation": float((drawn - mean).abs().sum(-1).mean() / 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the figures that are kept."""
    parser = ArgumentParser(description="How far a posterior of svi has come from its prior.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a fit")
    parser.add_argument("--base", help="folder or hub name of the base network, if it has moved")
    parser.add_argument("--data-dir", help="folder of the task's files, if they have moved")
    parser.add_argument("--rows", type=int, default=400, help="the first ones of the validation split")
    parser.add_argument("--draws", type=int, default=64, help="of the weights; half as many predict")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--threads", type=int, default=1, help="threads of this process")
    parser.add_argument("--results", type=Path, default=RESULTS / "contraction.json", help="figures that are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("medium")  # as studies have it, whose fits these are
    kept = {run.name: measured(run, options) for run in options.runs}
    print(
        markdown(
            ["fit", *COLUMNS.values()],
            [[run, *(_cell(name, found[name]) for name in COLUMNS)] for run, found in kept.items()],
        )
    )
    protocol = {"draws": options.draws, "rows": options.rows, "seed": options.seed}
    write_json(options.results, {"protocol": protocol, "environment": environment(torch.device("cpu")), "fits": kept})
    print(f"\nWrote {options.results}.")


def _cell(name: str, value: float) -> str:
    return f"{value:,}" if name == "random" else f"{value:.3f}"


if __name__ == "__main__":
    main()
