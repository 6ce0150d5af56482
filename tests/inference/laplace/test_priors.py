"""Priors that are read from the program's trace."""

from __future__ import annotations

import pyro
import pytest
from curvature_scenarios import given
from pyro.distributions import StudentT
from scenarios import awake, tiny_program, tiny_rows
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.weights import Site


def test_a_prior_of_a_sum_is_named() -> None:
    program = awake(tiny_program(MonteCLoRA(collapse=False, components=2)))
    with pytest.raises(PosteriorError, match="Site 'linear_16x16.A' is made of other sites' draws.*collapse=True"):
        given(program, tiny_rows(6))


def test_a_prior_that_is_not_normal_is_named() -> None:
    class Heavy(Gaussian):
        def sample_weight(self, site: Site) -> Tensor:
            law = StudentT(3.0).expand(site.initial.shape).to_event(3)
            return pyro.sample(site.name, law)

    with pytest.raises(PosteriorError, match="prior of site .linear_16x16.A. is a StudentT; .* needs a ColumnNormal"):
        given(awake(tiny_program(Heavy())), tiny_rows(6))
