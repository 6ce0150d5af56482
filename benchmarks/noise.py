"""How much of a gradient the noise of A leaves: when B is zero, and later.

    python benchmarks/noise.py --base sentence-transformers/all-MiniLM-L6-v2

SVI as it comes is trained on rows of SST-2 for as many epochs as `--epochs` says. At each of these points the gradient
of the loss of one batch of 32 rows, without dropout and without a divergence, is taken under `--passes` draws with
parts of the guide's noise. AdamW divides a gradient by the root of its mean square, so that a weight moves along the
mean gradient by as much as that is part of it: the table has the root of sum (E g)^2 / sum E g^2 over the entries of
A, of B and of the head, with what chance adds to (E g)^2 taken off; beside it the cosine of E g with the gradient
without noise. Where B is zero A has no gradient. Some minutes with MiniLM on one CPU core. Prints a Markdown table,
and writes benchmarks/results/noise.json.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, markdown
from torch import Tensor

import bayeslora as bl
from bayeslora.files import write_json
from bayeslora.inference.variational.estimators import Draw
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide
from bayeslora.passes import Rows, undisturbed
from bayeslora.rng import isolated

SHARES = (0.1, 0.3, 1.0)
ROLES = ("A", "B", "head")


def gradients(program: bl.Program, guide: Guide, rows: Rows, share: float, passes: int) -> dict[str, Tensor]:
    """Gradients of the loss of a batch (passes, entries) in the weights, by their role."""
    batch, _ = next(rows.batches(program.device))
    estimator, found = Draw(guide, share), []
    with undisturbed(program), isolated(0, program.device):
        for _ in range(passes):
            drawn = estimator(program.model.weights(guide()), batch)
            weights = {name: torch.as_tensor(value).detach().requires_grad_() for name, value in drawn.items()}
            outputs = program.outputs(weights, batch)
            (-program.observation.log_prob(outputs, batch["labels"]).mean()).backward()
            found.append({site.name: weights[site.name].grad for site in program.sites})
    names = {role: [site.name for site in program.sites if site.role == role] for role in ROLES}
    return {
        role: torch.stack([torch.cat([each[name].flatten() for name in own]) for each in found])
        for role, own in names.items()
    }


def left(drawn: Tensor, plain: Tensor) -> dict[str, float]:
    """What the noise leaves of a gradient."""
    mean, spread = drawn.mean(0), drawn.var(0) / len(drawn)
    power = (mean.square() - spread).sum().clamp(min=0) / drawn.square().mean(0).sum()
    return {"part": float(power.sqrt()), "cosine": float(torch.cosine_similarity(mean, plain, dim=0))}


def measured(program: bl.Program, guide: Guide, rows: Rows, passes: int) -> dict[str, dict[str, dict[str, float]]]:
    """What each part of the noise leaves of each gradient."""
    plain = {role: each[0] for role, each in gradients(program, guide, rows, 0.0, 1).items()}
    found = {}
    for share in SHARES:
        drawn = gradients(program, guide, rows, share, passes)
        found[str(share)] = {role: left(each, plain[role]) for role, each in drawn.items() if bool(plain[role].any())}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = ArgumentParser(description="How much of a gradient the noise of A leaves.")
    parser.add_argument("--base", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--passes", type=int, default=64)
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 1, 8])
    parser.add_argument("--results", type=Path, default=RESULTS / "noise.json")
    options = parser.parse_args(arguments)
    task = bl.load_task("sst2", data_dir=options.data_dir, train_size=options.train_size)
    program = bl.Program.from_pretrained(options.base, task)
    rows = Rows.of(program, task.train, 32, progress=False)
    kept: dict[str, Any] = {}
    for epochs in options.epochs:
        guide = make_guide("structured", program.model, program.sites)
        if epochs:
            guide = bl.fit(program, task.train, "svi", epochs=epochs, heldout_size=0, progress=False).guide
        kept[str(epochs)] = measured(program, guide, rows, options.passes)
    table = [
        [epochs, share, *(" / ".join(f"{value:.2f}" for value in of.get(role, {}).values()) for role in ROLES)]
        for epochs, shares in kept.items()
        for share, of in shares.items()
    ]
    print(markdown(["epochs", "of the noise", *(f"{role}: part / cosine" for role in ROLES)], table))
    protocol = {"rows": options.train_size, "passes": options.passes}
    write_json(options.results, {"protocol": protocol, "environment": environment(program.device), "epochs": kept})


if __name__ == "__main__":
    main()
