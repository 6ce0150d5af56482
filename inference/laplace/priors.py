"""Gaussian priors of LoRA matrices, read from the trace of the program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference.laplace.gaussian import Roots
from bayeslora.inference.laplace.jacobians import as_matrices
from bayeslora.models.distributions import ColumnNormal, IsotropicNormal, base_of
from bayeslora.program import Program
from bayeslora.sites import Site

__all__ = ["NormalPrior", "normal_prior"]


@dataclass(frozen=True)
class NormalPrior:
    """Independent columns of each matrix, a ~ N(centre, R R^T), in the layout of `as_matrices`.

    Attributes:
        centres: (layers, columns, rank) by site.
        roots: R (layers, rank, rank) by site, in double precision.
    """

    centres: Mapping[str, Tensor]
    roots: Roots

    def whitened(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values (layers, columns, rank) by site, where the prior is standard normal."""
        return {
            name: torch.linalg.solve_triangular(root, (values[name] - self.centres[name]).to(root).mT, upper=False).mT
            for name, root in self.roots.items()
        }

    def log_prob(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log density at values (layers, columns, rank), by site."""
        constants = self.log_constants()
        return {name: constants[name] - value.square().sum() / 2 for name, value in self.whitened(values).items()}

    def log_constants(self) -> dict[str, Tensor]:
        """Log density at the centres, by site."""
        found = {}
        for name, root in self.roots.items():
            columns = self.centres[name].shape[1]
            logs = root.diagonal(dim1=-2, dim2=-1).log() + math.log(2 * math.pi) / 2
            found[name] = -columns * logs.sum()
        return found

    def scaled(self, log: Tensor) -> NormalPrior:
        """The prior with all standard deviations multiplied by exp(log), (1,)."""
        return replace(self, roots={name: log.exp().to(root.device) * root for name, root in self.roots.items()})

    def times(self, multiple: float) -> NormalPrior:
        """The prior that is so many times as wide."""
        return self.scaled(torch.tensor([multiple], dtype=torch.float64).log())


def normal_prior(program: Program, sites: Sequence[Site], latents: Mapping[str, Tensor]) -> NormalPrior:
    """The prior of ``sites`` with all other latent sites at the values in ``latents``.

    Raises:
        PosteriorError: the prior of a site is not normal, or its columns differ in covariance (the message names it).
        SettingError: its variance is zero or infinite.
    """
    trace = poutine.trace(poutine.condition(program.prior, data=dict(latents))).get_trace()
    centres, roots = {}, {}
    for site in sites:
        mean, covariance = _moments(site, trace.nodes[site.name])
        centres[site.name] = as_matrices(site, mean.expand(site.initial.shape))
        try:
            roots[site.name] = torch.linalg.cholesky(covariance.double())
        except torch.linalg.LinAlgError as error:
            raise SettingError(
                f"The variance of the prior of site '{site.name}' is zero or infinite in single precision: its scale "
                "is too small or too large."
            ) from error
    return NormalPrior(centres, roots)


def _moments(site: Site, node: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean, and covariance (layers, rank, rank) of a column."""
    if node["infer"].get("_deterministic"):
        raise PosteriorError(
            f"Site '{site.name}' is made of other sites' draws, and no draw itself: choose another model of the "
            "weights, or give monteclora collapse=True."
        )
    law = base_of(node["fn"])
    layers, _, rank = as_matrices(site, site.initial).shape
    if isinstance(law, ColumnNormal):
        return law.mean, law.covariance_matrix.expand(layers, rank, rank)
    if isinstance(law, IsotropicNormal):
        eye = torch.eye(rank, dtype=law.scale.dtype, device=law.scale.device)
        return law.mean, (law.scale.square() * eye).expand(layers, rank, rank)
    raise PosteriorError(
        f"The prior of site '{site.name}' is a {type(law).__name__}; Laplace's approximation needs a ColumnNormal or "
        "an IsotropicNormal there. Choose another model of the weights."
    )
