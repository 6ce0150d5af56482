"""Isotropic Gaussian prior over LoRA matrices: the prior of Laplace-LoRA and of mean-field variational inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from bayeslora.errors import SettingError
from bayeslora.models.base import WeightModel
from bayeslora.models.distributions import ColumnNormal
from bayeslora.models.guides.base import Guide, GuideList, MatrixGuide, Spread
from bayeslora.sites import Site

__all__ = ["Gaussian", "GaussianGuide", "entry_guide"]

#: What shares one standard deviation: a direction of a layer's rank, a layer, or nothing.
Noise = Literal["rank", "layer", "entry"]


@dataclass(frozen=True, kw_only=True)
class Gaussian(WeightModel):
    """Independent normal entries: a ~ N(centre, sigma0^2).

    Latent site of a random site ``g.A``: itself, (layers, columns, rank).

    Attributes:
        noise: what the structured guide learns a standard deviation for: "rank", each layer and direction of the rank,
            shared by the columns; "layer"; or "entry", every entry (mean-field). Accuracy / NLL / ECE-15 of
            `WeightModel`'s example: "rank" .842 / .348 / .024, "entry" .842 / .349 / .032.
    """

    name: ClassVar[str] = "gaussian"

    noise: Noise = "rank"

    def sample_weight(self, site: Site) -> Tensor:
        """Sample one site; (layers, columns, rank)."""
        law = ColumnNormal(self.prior_mean(site), self.sigma0(site), validate_args=False)
        return pyro.sample(site.name, law.to_event(1))

    def latents(self, site: Site) -> dict[str, Tensor]:
        """The matrix at the start."""
        return {site.name: site.start}

    def site_guide(self, site: Site) -> GaussianGuide:
        """Normal with learned means and scales: see `GaussianGuide`."""
        return GaussianGuide(self, site, self.noise)


class GaussianGuide(MatrixGuide):
    """Posterior family of one site: N(mu, (eps sigma0)^2), eps learned for each rank direction, layer or entry."""

    sigma0: Tensor

    def __init__(self, model: WeightModel, site: Site, noise: Noise) -> None:
        super().__init__(site, [site.name])
        layers, columns, rank = site.initial.shape
        shape = {"rank": (layers, 1, rank), "layer": (layers, 1, 1), "entry": (layers, columns, rank)}[noise]
        self.noise = noise
        self.log_eps = nn.Parameter(site.initial.new_full(shape, math.log(model.eps)))
        self.register_buffer("sigma0", model.sigma0(site))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the matrix."""
        return {self.name: pyro.sample(self.name, self._law())}

    def spreads(self) -> dict[str, Spread]:
        """Independent normal entries."""
        return {self.name: Spread(self.mu, self.sigma0 * self.log_eps.exp())}

    def _law(self) -> dist.TorchDistribution:
        eps = self.log_eps.exp()
        if self.noise == "entry":
            return dist.Normal(self.mu, self.sigma0 * eps, validate_args=False).to_event(3)
        if self.noise == "layer":
            return ColumnNormal(self.mu, self.sigma0 * eps, validate_args=False).to_event(1)
        factor = eps.squeeze(-2).diag_embed()
        return ColumnNormal(self.mu, self.sigma0, factor, validate_args=False).to_event(1)


def entry_guide(model: WeightModel, sites: Sequence[Site]) -> Guide:
    """A standard deviation for each entry of the random matrices, whatever ``noise`` a model has for its own guide.

    Raises:
        SettingError: the model has further sites, which this guide is not of.
    """
    others = sorted(model.stochastic(sites) - {site.name for site in sites})
    if others:
        raise SettingError(
            f"guide='entry' is of the entries of LoRA matrices alone, and the model '{model.name}' has {others[0]} "
            f"({len(others)} such sites): choose model='gaussian', or another guide."
        )
    return GuideList([GaussianGuide(model, site, "entry") for site in sites])
