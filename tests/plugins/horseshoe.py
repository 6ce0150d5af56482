"""A horseshoe prior over the rank: directions that no column needs shrink to nothing (Carvalho et al., 2010)."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist

import bayeslora as bl
from bayeslora.models import ColumnNormal, Gaussian, WeightModel
from bayeslora.models.guides import GuideList, PointGuide


@bl.register
@dataclass(frozen=True, kw_only=True)
class Horseshoe(WeightModel):
    """Columns a_i ~ N(centre, sigma0^2 diag(lambda)^2) with lambda_k ~ HalfCauchy(1) for each direction of the rank."""

    name = "horseshoe"

    def sample_weight(self, site):
        layers, _, rank = site.initial.shape
        prior = dist.HalfCauchy(site.initial.new_ones(layers, rank)).to_event(2)
        scales = pyro.sample(f"{site.name}.scales", prior)
        law = ColumnNormal(self.prior_mean(site), self.sigma0(site), scales.diag_embed())
        return pyro.sample(site.name, law.to_event(1))

    def latents(self, site):
        layers, _, rank = site.initial.shape
        return {f"{site.name}.scales": site.initial.new_ones(layers, rank), site.name: site.initial}

    def weights(self, values):
        return {name: value for name, value in values.items() if not name.endswith(".scales")}

    def site_guide(self, site):
        scales = {f"{site.name}.scales": self.latents(site)[f"{site.name}.scales"]}
        return GuideList([PointGuide(scales, combine=self.weights), Gaussian(eps=0.3).site_guide(site)])
