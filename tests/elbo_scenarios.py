"""Losses of tiny programs, their traces and gradients, and the bounds of fits."""

from __future__ import annotations

import math

import torch
from datasets import Dataset
from pyro.poutine import Trace
from scenarios import tiny_batch, tiny_program, tiny_rows
from torch import Tensor

from bayeslora.inference.variational.elbo import ELBOS
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models import Gaussian, MonteCLoRA, WeightModel
from bayeslora.models.guides.auto import make_guide

N = 24
MODELS = {
    "covariance": MonteCLoRA(components=3),
    "precision": MonteCLoRA(components=3, wishart_on="precision"),
    "expanded": MonteCLoRA(components=3, collapse=False),
    "paper": MonteCLoRA(components=3, prior="paper", cooperation=0.5),
    "gaussian": Gaussian(sites="both"),
}


def objective(model: WeightModel, elbo: str = "mean-field", size: int = N, dropout: float = 0.0) -> NegativeELBO:
    """The loss of a tiny program, its guide away from where it started."""
    program = tiny_program(model, dropout=dropout)
    guide = make_guide("structured", model, program.sites)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return NegativeELBO(program, guide, ELBOS[elbo](num_particles=1), size).eval()


def remember(loss: NegativeELBO) -> list[tuple[Trace, Trace]]:
    """A list that gets the traces of the model and of the guide at each pass."""
    traces: list[tuple[Trace, Trace]] = []
    take = loss.elbo.take
    loss.elbo.take = lambda: (traces.append(take()), traces[-1])[1]
    return traces


def gradients(loss: NegativeELBO, batch: dict[str, Tensor], seed: int = 1) -> tuple[float, dict[str, Tensor]]:
    loss.zero_grad()
    torch.manual_seed(seed)
    value = loss(batch)
    value.backward()
    return float(value.detach()), {name: p.grad.clone() for name, p in loss.guide.named_parameters()}


def whole(loss: NegativeELBO) -> dict[str, Tensor]:
    return tiny_batch(loss.program, tiny_rows(N))


def evidence_bound(
    posterior: VariationalPosterior, rows: Dataset, draws: int = 100, elbo: str = "trace"
) -> tuple[float, float]:
    """The ELBO of all rows under the posterior's guide, and its standard error."""
    loss = NegativeELBO(posterior.program, posterior.guide, ELBOS[elbo](), len(rows))
    batch = tiny_batch(posterior.program, rows)
    torch.manual_seed(2)
    with torch.no_grad():
        values = -len(rows) * torch.stack([loss(batch) for _ in range(draws)]).double()
    return float(values.mean()), float(values.std() / math.sqrt(draws))
