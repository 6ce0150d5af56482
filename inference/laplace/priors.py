"""Gaussian priors of LoRA matrices, read from the trace of the program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, biject_to

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference.laplace.gaussian import Roots
from bayeslora.inference.laplace.jacobians import as_matrices
from bayeslora.models.distributions import ColumnNormal, IsotropicNormal
from bayeslora.program import Program
from bayeslora.weights import Site

__all__ = ["HyperPrior", "NormalPrior", "normal_prior"]


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

    def scaled(self, logs: Mapping[str, Tensor]) -> NormalPrior:
        """The prior with the standard deviations of a site multiplied by exp(logs), (1,) or (layers,)."""
        return replace(self, roots={name: logs[name].exp()[:, None, None] * root for name, root in self.roots.items()})


def normal_prior(program: Program, sites: Sequence[Site], latents: Mapping[str, Tensor]) -> NormalPrior:
    """The prior of ``sites`` with all other latent sites at the values in ``latents``.

    Raises:
        PosteriorError: the prior of a site is not normal, or its columns differ in covariance (the message names it).
        SettingError: its variance is zero or infinite.
    """
    return _normal_prior(_trace(program, latents), sites)


def _trace(program: Program, latents: Mapping[str, Tensor]) -> poutine.Trace:
    return poutine.trace(poutine.condition(program.prior, data=dict(latents))).get_trace()


def _normal_prior(trace: poutine.Trace, sites: Sequence[Site]) -> NormalPrior:
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
    law: TorchDistribution = node["fn"]
    while isinstance(law, Independent):
        law = law.base_dist
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


class HyperPrior:
    """The prior of ``sites`` as a function of the model's hyper-sites, in their unconstrained spaces.

    Args:
        program: whose prior.
        sites: whose matrices.
        latents: values of all latent sites; those that are no weights are the start.
    """

    def __init__(self, program: Program, sites: Sequence[Site], latents: Mapping[str, Tensor]) -> None:
        self._program, self._sites, self._latents = program, sites, dict(latents)
        weights = {site.name for site in program.sites}
        self._transforms = {
            name: biject_to(node["fn"].support)
            for name, node in _trace(program, latents).nodes.items()
            if name in self._latents and name not in weights
        }
        self.start = {
            name: transform.inv(self._latents[name]).detach().clone() for name, transform in self._transforms.items()
        }

    @property
    def shapes_weights(self) -> bool:
        """Whether the prior of the weights depends on a hyper-site; on auxiliary ones of a guide it does not."""
        values = [value.double().requires_grad_() for value in self.start.values()]
        if not values:
            return False
        prior, _ = self.at(dict(zip(self.start, values, strict=True)))
        # A factor may come and go again on the way to a root: what counts is the derivative, beyond rounding.
        total = torch.stack([root.diagonal(dim1=-2, dim2=-1).log().sum() for root in prior.roots.values()]).sum()
        found = torch.autograd.grad(total, values, allow_unused=True) if total.requires_grad else []
        return any(each is not None and bool((each.abs() > 1e-6).any()) for each in found)

    def constrained(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The hyper-sites' values."""
        return {name: transform(values[name]) for name, transform in self._transforms.items()}

    def at(self, values: Mapping[str, Tensor]) -> tuple[NormalPrior, Tensor]:
        """The prior of the weights, and the log density of the hyper-sites."""
        trace = _trace(self._program, self._latents | self.constrained(values))
        trace.compute_log_prob(lambda name, node: name in self._transforms)
        density = torch.stack([trace.nodes[name]["log_prob_sum"].double() for name in self._transforms]).sum()
        return _normal_prior(trace, self._sites), density
