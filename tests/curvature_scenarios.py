"""Laplace's approximation of small programs, and its curvature as one matrix."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from scenarios import awake, dense_jacobian, tiny_batch, tiny_program
from torch import Tensor

from bayeslora.inference import fit
from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.models import Gaussian
from bayeslora.program import Program
from bayeslora.tasks import Split

#: One batch of all rows and a rate that falls to zero: the mode to six digits.
EXACT = {
    "batch_size": 40, "epochs": 800, "learning_rate": 0.1, "schedule": "cosine", "warmup": 0.02,
    "max_grad_norm": 1e9, "log_every": 100, "progress": False,
}  # fmt: skip


def tiny(**settings: object) -> Program:
    """A random transformer whose A and B both have a Gaussian prior."""
    return awake(tiny_program(Gaussian(sites="both", centre="zero"), **settings))


def given(program: Program, rows: Dataset, **settings: Any) -> LaplacePosterior:
    """Laplace's approximation around the weights as they are."""
    fixed = {"mode": "given", "tune": "none", "progress": False, "batch_size": 5} | settings
    posterior = fit(program, rows, "laplace", **fixed)
    assert isinstance(posterior, LaplacePosterior)
    return posterior


def dense_curvature(found: Program, rows: Split) -> Tensor:
    """The generalised Gauss-Newton matrix by autograd on one row at a time, without padding."""
    total = torch.zeros(1, dtype=torch.float64)
    for number in range(len(rows)):
        batch = tiny_batch(found, rows.select([number]))
        jacobian = dense_jacobian(found, batch)
        flat = torch.cat([each[0].flatten(1) for each in jacobian.values()], dim=1).double()
        p = found.outputs({site.name: site.initial for site in found.sites}, batch)[0].double().softmax(-1)
        total = total + flat.mT @ (p.diag() - torch.outer(p, p)) @ flat
    return total


def relative(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def matrix_of(posterior: LaplacePosterior) -> Tensor:
    """F as one matrix, from any of its forms."""
    curvature, tensors = posterior.curvature, posterior.curvature.tensors()
    if curvature.kind == "full":
        return tensors["matrix"].double()
    if curvature.kind == "exact":
        return tensors["jacobian"].double().mT @ tensors["jacobian"].double()
    if curvature.kind == "diag":
        return torch.cat([tensors[name].flatten() for name in curvature.shapes]).double().diag()
    blocks = []
    for name, (layers, _, _) in curvature.shapes.items():
        for place in range(layers):
            vectors, values = tensors[f"{name}.vectors"][place], tensors[f"{name}.values"][place]
            blocks.append(torch.kron((vectors * values) @ vectors.mT, tensors[f"{name}.narrow"][place].double()))
    return torch.block_diag(*blocks)
