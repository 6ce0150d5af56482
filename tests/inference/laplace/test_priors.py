"""Priors that are read from the program's trace."""

from __future__ import annotations

import pyro
import pytest
import torch
from curvature_scenarios import given
from pyro.distributions import StudentT
from scenarios import awake, tiny_program, tiny_rows
from torch import Tensor
from torch.distributions import MultivariateNormal

from bayeslora.errors import PosteriorError
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.sites import Site


def test_a_prior_of_a_sum_is_named() -> None:
    program = awake(tiny_program(MonteCLoRA(collapse=False, components=2)))
    with pytest.raises(PosteriorError, match="Site 'linear_16x16.A' is made of other sites' draws.*collapse=True"):
        given(program, tiny_rows(6))


def test_the_density_is_that_of_independent_normal_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 3, 3, generator=generator).double().tril()
    root.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
    centre, value = torch.randn(2, 2, 5, 3, generator=generator)
    prior = NormalPrior({"A": centre}, {"A": root})
    for multiple in (1.0, 3.0):
        law = MultivariateNormal(centre.double(), scale_tril=multiple * root.unsqueeze(1))
        wider = prior.scaled(torch.tensor([multiple], dtype=torch.float64).log())
        torch.testing.assert_close(wider.log_prob({"A": value})["A"], law.log_prob(value.double()).sum())
        torch.testing.assert_close(wider.log_constants()["A"], law.log_prob(centre.double()).sum())


def test_a_prior_that_is_not_normal_is_named() -> None:
    class Heavy(Gaussian):
        def sample_weight(self, site: Site) -> Tensor:
            law = StudentT(3.0).expand(site.initial.shape).to_event(3)
            return pyro.sample(site.name, law)

    with pytest.raises(PosteriorError, match="prior of site .linear_16x16.A. is a StudentT; .* needs a ColumnNormal"):
        given(awake(tiny_program(Heavy())), tiny_rows(6))
