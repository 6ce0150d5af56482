"""How well a width and a temperature hold elsewhere that few rows have chosen, under several hyperpriors.

    python benchmarks/set_aside.py RUN...

Each run is plain LoRA's with some hundreds of rows held out, such as the cells of ``studies/defaults.yaml``. Around its
weights `laplace` has widths of its prior and temperatures of its predictions; of its held-out rows some are drawn, the
best pair under each hyperprior is chosen on them, and the validation rows say what that is worth.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from common import RESULTS, markdown, say
from torch import Tensor

import bayeslora as bl
from bayeslora import files
from bayeslora.app import runs
from bayeslora.inference.laplace.heldout import MULTIPLES
from bayeslora.inference.laplace.laplace import Laplace
from bayeslora.inference.laplace.links import LINKS
from bayeslora.inference.laplace.posterior import LaplacePosterior, linearised, linked
from bayeslora.passes import Rows, undisturbed

WIDTHS = MULTIPLES[::2]
TEMPERATURES = torch.logspace(-1.5, 2.5, 41, base=math.e, dtype=torch.float64)
SIZES, DRAWS = (30, 80, 200), 150


class Hyperprior(NamedTuple):
    """The likeliest width, the deviation of its logarithm, and that of the temperature's below and above 1."""

    centre: float
    width: float
    surer: float
    flatter: float

    def cost(self) -> Tensor:
        """Minus its log density, up to a constant (widths, temperatures)."""
        log = TEMPERATURES.log()
        scale = torch.where(log < 0, self.surer, self.flatter)
        return ((WIDTHS / self.centre).log() / self.width).square().unsqueeze(1) / 2 + (log / scale).square() / 2


HYPERPRIORS = (
    Hyperprior(1.0, 1.0, 0.5, 0.5), Hyperprior(1.0, 0.5, 0.5, 1.0), Hyperprior(0.3, 0.5, 0.5, 1.0),
    Hyperprior(0.3, 1.0, 0.5, 1.0), Hyperprior(0.3, 0.5, 0.5, 2.0), Hyperprior(0.1, 0.5, 0.5, 1.0),
    Hyperprior(0.01, 0.02, 0.5, 1.0),
)  # fmt: skip


def around(run: Path) -> tuple[LaplacePosterior, bl.Task]:
    """Laplace's approximation around the weights of a run, under its default prior as it comes, and the run's task."""
    start = bl.load(run)
    task = runs.saved_task(start)
    model, settings = Laplace.default_model
    program = runs.build_program(replace(runs.saved_config(run), model=model, model_settings=settings), task)
    found = bl.fit(program, task.train, "laplace", start=start, tune="none", progress=False)
    assert isinstance(found, LaplacePosterior)
    return found, task


def losses(posterior: LaplacePosterior, split: bl.Split) -> Tensor:
    """Minus the log-likelihood of each row under each width and temperature (widths, temperatures, rows)."""
    rows = Rows.of(posterior.program, split)
    with undisturbed(posterior.program):
        means, covariances = linearised(posterior, rows, WIDTHS)
    found = []
    for covariance in covariances:
        outputs = linked(rows.observation, means, covariance, LINKS[0], 0).outputs
        logs = (outputs[0].double().log_softmax(-1) / TEMPERATURES.view(-1, 1, 1)).log_softmax(-1)
        found.append(-logs[:, torch.arange(len(rows)), rows.labels])
    return torch.stack(found)


def elsewhere(heldout: Tensor, validation: Tensor, hyperprior: Hyperprior, size: int) -> float:
    """Validation NLL of what so many held-out rows choose, the mean over choices of these."""
    generator = torch.Generator().manual_seed(0)
    cost, nll = hyperprior.cost(), validation.mean(-1).flatten()
    picked = [torch.randperm(heldout.shape[-1], generator=generator)[:size] for _ in range(DRAWS)]
    return mean(float(nll[(heldout[..., rows].sum(-1) + cost).argmin()]) for rows in picked)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "set_aside.json")
    options = parser.parse_args(arguments)
    lines = []
    for run in options.runs:
        posterior, task = around(run)
        validation = losses(posterior, task.validation)
        heldout = losses(posterior, task.heldout)
        say(f"{run.name}: the best of all has an NLL of {float(validation.mean(-1).min()):.3f}.")
        for size in (each for each in SIZES if each <= heldout.shape[-1]):
            for each in HYPERPRIORS:
                nll = elsewhere(heldout, validation, each, size)
                lines.append({"run": run.name, "rows": size, **each._asdict(), "nll": nll})
    files.write_json(options.results, lines)
    sizes = sorted({line["rows"] for line in lines})
    table = [
        [*(f"{value:g}" for value in each)]
        + [f"{mean(x['nll'] for x in lines if x['rows'] == size and _of(x, each)):.4f}" for size in sizes]
        for each in HYPERPRIORS
    ]
    print(markdown([*Hyperprior._fields, *(f"{size} rows" for size in sizes)], table))


def _of(line: dict[str, float], hyperprior: Hyperprior) -> bool:
    return all(line[name] == value for name, value in hyperprior._asdict().items())


if __name__ == "__main__":
    main()
