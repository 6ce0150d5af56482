"""What the estimators of the bound do: variance of the gradient of one batch over draws, and time of a pass.

    python benchmarks/estimators.py --base sentence-transformers/all-MiniLM-L6-v2

SVI with the Gaussian model is trained for three epochs on 256 rows of SST-2, so that B is no longer zero. Then the
gradient of the loss of one batch of 32 rows is taken under each estimator as often as `--passes` says, without dropout.
Variances are summed over the parameters of a group: means of A, deviations, and points (B and the head). Prints a table
and writes benchmarks/results/estimators.json, from which the docstring of `SVI` quotes.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch
from common import RESULTS, environment, markdown

import bayeslora as bl
from bayeslora.files import write_json
from bayeslora.inference.variational.elbo import ELBOS
from bayeslora.inference.variational.estimators import make_estimator
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.passes import Rows, undisturbed

KINDS = ("draw", "flipout", "local")


def measured(posterior: bl.Posterior, rows: Rows, kind: str, passes: int) -> dict[str, float]:
    """Variance of the gradient by group of parameters, and seconds of a pass forth and back."""
    program, guide = posterior.program, posterior.guide
    estimator = make_estimator(kind, program, guide)
    loss = NegativeELBO(program, guide, ELBOS["mean-field"](num_particles=1), len(rows), estimator=estimator)
    batch, _ = next(rows.batches(program.device))
    found: dict[str, list[torch.Tensor]] = {}
    torch.manual_seed(0)
    begun = time.process_time()
    with undisturbed(program):
        for _ in range(passes):
            guide.zero_grad()
            loss(batch).backward()
            for name, group in guide.parameter_groups().items():
                gradients = [value.grad.flatten() for value in group if value.grad is not None]
                found.setdefault(name, []).append(torch.cat(gradients))
    seconds = (time.process_time() - begun) / passes
    return {name: float(torch.stack(each).var(0).sum()) for name, each in found.items()} | {"seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = ArgumentParser(description="What the estimators of the bound do.")
    parser.add_argument("--base", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--passes", type=int, default=24)
    parser.add_argument("--train-size", type=int, default=256)
    parser.add_argument("--results", type=Path, default=RESULTS / "estimators.json")
    options = parser.parse_args(arguments)
    task = bl.load_task("sst2", data_dir=options.data_dir, train_size=options.train_size)
    program = bl.Program.from_pretrained(options.base, task, model=bl.models.Gaussian(scale=1.5))
    rates = {"learning_rate": 2e-3, "point_learning_rate": 5e-3, "beta2": 0.999}
    settings = rates | {"noise_warmup": 0.0, "prior_mean": "model", "epochs": 3}
    posterior = bl.fit(program, task.train, "svi", progress=False, **settings)
    rows = Rows.of(program, task.train, 32)
    found = {kind: measured(posterior, rows, kind, options.passes) for kind in KINDS}
    columns = list(found["draw"])
    table = [[kind, *(f"{found[kind][name] / found['draw'][name]:.2f}" for name in columns)] for kind in KINDS]
    print(markdown(["relative to a draw", *columns], table))
    write_json(options.results, {"environment": environment(program.device), "found": found})


if __name__ == "__main__":
    main()
