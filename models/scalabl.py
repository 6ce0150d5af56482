"""ScalaBL: a LoRA matrix of which the singular values alone are random.

Samplawski et al., *Scalable Bayesian low-rank adaptation of large language models via stochastic variational subspace
inference*, UAI 2025 (arXiv 2506.21408).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayeslora.errors import SettingError
from bayeslora.models.base import WeightModel
from bayeslora.models.distributions import IsotropicNormal
from bayeslora.models.guides.base import Guide
from bayeslora.sites import Site

__all__ = ["ScalaBL", "ScalaBLGuide"]

#: What the names of latent sites end with: s, and the singular vectors P and Q.
VALUES, COLUMNS, RANK = "singular_values", "column_vectors", "rank_vectors"


@dataclass(frozen=True, kw_only=True)
class ScalaBL(WeightModel):
    """A = Q diag(s) P^T with independent normal s ~ N(centre, sigma0^2), r numbers a layer; P and Q are points.

    All start at the singular value decomposition of the initial matrix, so that the weights do not change. The settings
    of the prior are of s: ``centre="init"`` is its start, ``scale`` a multiple of the root mean square of the layer's
    singular values, and ``deviation`` a standard deviation of s itself. P and Q have the prior of other LoRA matrices
    that are points, and are not kept orthogonal.

    Latent sites of a random site ``g.A``: ``g.A.singular_values`` (layers, rank), and the points ``g.A.column_vectors``
    P (layers, columns, rank) and ``g.A.rank_vectors`` Q (layers, rank, rank).

    The published code differs: it throws Q away, which a fresh adapter can do without, since its B is zero; it learns
    log s; and its divergence is that of the prior from the posterior, KL(p || q), in a step of SGD for itself with a
    rate that rises exponentially. Here the bound has KL(q || p) with a weight of 1.

    Raises:
        SettingError: ``sites`` is not "A": B is zero where LoRA starts, and has no singular vectors.
    """

    name: ClassVar[str] = "scalabl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sites != "A":
            raise SettingError(f"scalabl has the singular values of A alone: sites is '{self.sites}', expected 'A'.")

    def sample_weight(self, site: Site) -> Tensor:
        """Sample s, P and Q of one site; (layers, columns, rank)."""
        start = site.singular_values
        centre = start if self.centre == "init" else torch.zeros_like(start)
        law = dist.Normal(centre, self.sigma0(site).squeeze(-1), validate_args=False)
        values = pyro.sample(f"{site.name}.{VALUES}", law.to_event(2))
        layers, columns, rank = site.initial.shape
        scale, kept = site.initial.new_full((), self.weight_scale), values.shape[-1]
        shapes = {COLUMNS: (layers, columns, kept), RANK: (layers, rank, kept)}
        left, right = (
            pyro.sample(f"{site.name}.{kind}", IsotropicNormal(scale, shape, validate_args=False))
            for kind, shape in shapes.items()
        )
        return pyro.deterministic(site.name, product(left, values, right))

    def latents(self, site: Site) -> dict[str, Tensor]:
        """The singular value decomposition at the start."""
        left, values, right = torch.linalg.svd(site.start, full_matrices=False)
        # Column by column, as LAPACK has them, no checkpoint could be written.
        parts = {VALUES: values, COLUMNS: left.contiguous(), RANK: right.mT.contiguous()}
        return {f"{site.name}.{kind}": value for kind, value in parts.items()}

    def stochastic(self, sites: Sequence[Site]) -> set[str]:
        """Names of the singular values."""
        return {f"{site.name}.{VALUES}" for site in self.split(sites)[0]}

    def weights(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, by site: products, and what is no part of one."""
        weights = {name: value for name, value in values.items() if name.rpartition(".")[2] not in (COLUMNS, RANK)}
        for name in [name for name in weights if name.endswith(f".{VALUES}")]:
            owner = name.removesuffix(f".{VALUES}")
            weights[owner] = product(values[f"{owner}.{COLUMNS}"], weights.pop(name), values[f"{owner}.{RANK}"])
        return weights

    def sigma0(self, site: Site) -> Tensor:
        """Prior standard deviation of a singular value, (layers, 1, 1)."""
        if self.deviation is not None:
            return torch.full_like(site.size, self.deviation)
        size = site.singular_values.square().mean(-1, keepdim=True).sqrt().unsqueeze(-1)
        return torch.where(size > 0, self.scale * size, self.zero_scale)

    def site_guide(self, site: Site) -> ScalaBLGuide:
        """Normal singular values with learned means and deviations: see `ScalaBLGuide`."""
        return ScalaBLGuide(self, site)


class ScalaBLGuide(Guide):
    """Posterior family of one site: s ~ N(mu, (eps sigma0)^2) with r learned eps a layer; P and Q are points."""

    sigma0: Tensor

    def __init__(self, model: ScalaBL, site: Site) -> None:
        parts = model.latents(site)
        super().__init__(parts)
        self.name = site.name
        values, left, right = parts.values()
        self.mu = nn.Parameter(values.clone())
        self.log_eps = nn.Parameter(torch.full_like(values, math.log(model.eps)))
        self.column_vectors, self.rank_vectors = nn.Parameter(left.clone()), nn.Parameter(right.clone())
        self.register_buffer("sigma0", model.sigma0(site).squeeze(-1))

    @property
    def point_sites(self) -> tuple[str, ...]:
        """The singular vectors."""
        return self.latents[1:]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the singular values; declare the vectors as Delta sites."""
        values = pyro.sample(self.latents[0], self._law())
        left, right = (
            pyro.sample(name, dist.Delta(value, event_dim=3, validate_args=False))
            for name, value in zip(self.latents[1:], (self.column_vectors, self.rank_vectors), strict=True)
        )
        return dict(zip(self.latents, (values, left, right), strict=True))

    def mean(self) -> dict[str, Tensor]:
        """The matrices at the means of the singular values, (layers, columns, rank)."""
        return {self.name: product(self.column_vectors, self.mu, self.rank_vectors).detach()}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density of the singular values.

        Raises:
            PosteriorError: the value of a site is missing.
        """
        self._require(values)
        found: Tensor = self._law().log_prob(values[self.latents[0]])
        return found

    def noise_scales(self) -> dict[str, Tensor]:
        """Eps: (layers, rank)."""
        return {f"{self.latents[0]}.eps": self.log_eps.detach().exp()}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Means of the singular values, their deviations, and the vectors."""
        return {"location": [self.mu], "scale": [self.log_eps], "point": [self.column_vectors, self.rank_vectors]}

    def _law(self) -> dist.TorchDistribution:
        return dist.Normal(self.mu, self.sigma0 * self.log_eps.exp(), validate_args=False).to_event(2)


def product(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """P diag(s) Q^T: (layers, columns, k), (layers, k) and (layers, rank, k) to (layers, columns, rank)."""
    return (left * values.unsqueeze(-2)) @ right.mT
