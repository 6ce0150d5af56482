"""How far each form of curvature is from the whole generalised Gauss-Newton matrix, on the embedded demo.

    python benchmarks/curvature.py

Plain LoRA of rank 4 on queries and values, trained on 400 rows of several tokens each; then F by every form around the
same weights, under the prior that the evidence picks with F itself. Errors are of F, of its blocks for each matrix
(relative Frobenius norms: all forms but the last leave out what is between matrices), and of the variances of the
logits of 500 test rows (median of their relative sizes); log evidence (nats) and NLL of those rows say whether it
matters. Takes a minute on 2 CPU cores. Writes benchmarks/results/curvature.json.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, environment, markdown
from torch import Tensor

import bayeslora as bl
from bayeslora.files import write_json
from bayeslora.inference.laplace.posterior import LaplacePosterior, linearised
from bayeslora.passes import Rows

ROWS, TEST_ROWS, EPOCHS = 400, 500, 10
#: Every form, by the settings that ask for it.
FORMS: dict[str, dict[str, Any]] = {
    "diag": {"curvature": "diag"},
    **{
        f"kron, {sharing}, rank {rank}": {"curvature": "kron", "sharing": sharing, "curvature_rank": rank}
        for sharing in ("sum", "expand")
        for rank in (4, 16, 64)
    },
    "full": {"curvature": "full"},
}
COLUMNS = {
    "matrix": "error of F",
    "blocks": "of its blocks",
    "variance": "of variances",
    "log_evidence": "log evidence",
    "nll": "NLL",
}


def trained(rows: int, epochs: int) -> tuple[bl.Task, bl.Posterior]:
    """The demo's task, and plain LoRA."""
    from peft import LoraConfig

    task = bl.load_task("demo", train_size=rows)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    prior = bl.models.Gaussian(sites="both", centre="zero")
    program = bl.Program.from_pretrained("demo", task, lora=lora, model=prior)
    return task, bl.fit(program, task.train, "mle", epochs=epochs, batch_size=16, cpu=True, progress=False)


def dense(posterior: LaplacePosterior) -> Tensor:
    """F as one matrix, whatever its form: what it does to unit vectors, by the basis in which it is diagonal."""
    curvature = posterior.curvature
    size, layers = curvature.size, curvature.layers
    unit = {
        name: torch.eye(shape[-1], dtype=torch.float64).expand(shape[0], -1, -1)
        for name, shape in curvature.shapes.items()
    }
    basis = curvature.basis(unit)
    shapes = [curvature.shapes[name][1:] for name, _ in layers]
    parts = torch.eye(size, dtype=torch.float64).split([columns * rank for columns, rank in shapes], dim=1)
    coordinates = [
        basis.project(key, part.unflatten(1, shape)) for key, part, shape in zip(layers, parts, shapes, strict=True)
    ]
    if basis.local:
        return torch.stack(
            [(each * basis.gains(key)) @ each.mT for key, each in zip(layers, coordinates, strict=True)]
        ).sum(0)
    together = torch.stack(coordinates).sum(0)
    return (together * basis.gains(layers[0])) @ together.mT


def measure(rows: int = ROWS, test_rows: int = TEST_ROWS, epochs: int = EPOCHS) -> dict[str, dict[str, float]]:
    """Figures of every form."""
    task, plain = trained(rows, epochs)
    program = plain.program
    test = task.split("test").select(range(test_rows))
    over = Rows.of(program, test, 64)
    around: dict[str, Any] = {"start": plain, "cpu": True, "progress": False}
    exact = bl.fit(program, task.train, "laplace", curvature="full", **around)
    assert isinstance(exact, LaplacePosterior)
    matrix, (_, (covariances,)) = dense(exact), linearised(exact, over, torch.ones(1))
    sizes = [torch.Size(exact.curvature.shapes[name][1:]).numel() for name, _ in exact.curvature.layers]
    blocks = torch.block_diag(*(torch.ones(size, size, dtype=torch.float64) for size in sizes))
    found = {}
    for name, settings in FORMS.items():
        fitted = bl.fit(program, task.train, "laplace", tune="none", **settings, **around)
        assert isinstance(fitted, LaplacePosterior)
        fitted.prior = exact.prior
        means, (other,) = linearised(fitted, over, torch.ones(1))
        ratios = (other - covariances).diagonal(dim1=-2, dim2=-1) / covariances.diagonal(dim1=-2, dim2=-1)
        found[name] = {
            "matrix": _relative(dense(fitted), matrix),
            "blocks": _relative(dense(fitted) * blocks, matrix * blocks),
            "log_evidence": float(fitted.mode_evidence(exact.prior)),
            "variance": median(ratios.abs().flatten().tolist()),
            "nll": fitted.predict(test, progress=False).metrics(intervals=False)["nll"].value,
        }
    return found


def _relative(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """All forms."""
    rows = [
        [name, *(f"{each[key]:.2f}" for key in COLUMNS if key != "nll"), f"{each['nll']:.4f}"]
        for name, each in found.items()
    ]
    return markdown(["curvature", *COLUMNS.values()], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = ArgumentParser(description="How far each form of curvature is from the whole matrix.")
    parser.add_argument("--results", type=Path, default=RESULTS / "curvature.json")
    parser.add_argument("--quick", action="store_true", help="few rows, two epochs: to see that it works")
    options = parser.parse_args(arguments)
    found = measure(48, 8, 2) if options.quick else measure()
    print(table(found))
    write_json(options.results, {"environment": environment(torch.device("cpu")), "forms": found})
    print(f"\nWrote {options.results}.")


if __name__ == "__main__":
    main()
