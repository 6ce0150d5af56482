"""MonteCLoRA: columns of a LoRA matrix with a Wishart covariance and a Dirichlet-weighted mixture of draws.

Sengupta, Seth, Pathak, Raman, Gopalakrishnan, Chakraborty: Robust and Efficient Fine-tuning of LLMs with Bayesian
Reparameterization of Low-Rank Adaptation, TMLR 2025 (arXiv 2411.04358).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayeslora.errors import SettingError
from bayeslora.models.base import WeightModel
from bayeslora.models.distributions import ColumnNormal
from bayeslora.models.guides.base import MatrixGuide, Spread
from bayeslora.models.wishart import DiagonalWishartCholesky
from bayeslora.settings import Count, NotNegative, Positive
from bayeslora.sites import Site

__all__ = ["MonteCLoRA", "MonteCLoRAGuide"]


@dataclass(frozen=True, kw_only=True)
class MonteCLoRA(WeightModel):
    r"""Columns a_i = sum_k pi_k z_ik with z_ik ~ N(mu_i, Sigma), Sigma ~ Wishart and pi ~ Dirichlet, for each layer.

    The weighted sum of ``components`` draws has the law N(mu_i, \|pi\|^2 Sigma), so one draw replaces them
    (``collapse``). The paper's equations 5 to 7 leave the size of the noise to the Wishart scale, and it then grows
    with the rank. Here Sigma has mean I, and \|pi\|^2 is divided by its prior mean (alpha0 + 1) / (components alpha0
    + 1), so that the prior variance of an entry is sigma0^2 exactly, at any rank and number of components.

    Latent sites of a random site ``g.A``: ``g.A.scale_tril`` (layers, rank, rank), ``g.A.mixture`` (layers,
    components), and ``g.A`` (layers, columns, rank) or, expanded, ``g.A.components`` (layers, components, columns,
    rank).

    Attributes:
        components: number N of draws that the paper mixes.
        prior: "hierarchical": a_i | Sigma, pi ~ N(centre, sigma0^2 \|pi\|^2 Sigma), so that the columns inform
            Sigma and pi. "paper": a_i ~ N(centre, sigma0^2 I); Sigma and pi are auxiliary variables of the guide, whose
            reverse model is their own prior (.848 / .351 / .029 where `WeightModel` has .842 / .364 / .030).
        wishart_on: the matrix that is Wishart: "covariance" (the paper's section 4.1) or "precision" (its
            introduction; conjugate).
        collapse: draw the weighted sum at once; otherwise draw every component. Same law, looser bound.
        nu: degrees of freedom of the Wishart law; 2 rank + 3 by default. At the paper's value, the rank, the inverse
            has no mean, and neither has the divergence of the columns. At the default it has a variance too, and its
            mean, (2 rank + 3) / (rank + 2), stays below 2 whatever the rank.
        alpha0: concentration of the Dirichlet prior, the same for each component.
        learn_eps: learn ``eps``, one number a layer, instead of keeping it (.832 / .368 / .032; from eps=0.1 on .846 /
            .431 / .079, with kl_warmup=0.5 besides .832 / .416 / .076: it stays too small).
        cooperation: weight lambda of the cooperative term -lambda sum_k pi_k^2 of each layer in the log-joint density
            (equation 13); only with the prior of the paper.
    """

    name: ClassVar[str] = "monteclora"

    components: Count = 4
    prior: Literal["hierarchical", "paper"] = "hierarchical"
    wishart_on: Literal["covariance", "precision"] = "covariance"
    collapse: bool = True
    nu: Positive | None = None
    alpha0: Positive = 1.0
    learn_eps: bool = False
    cooperation: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cooperation and self.prior != "paper":
            raise SettingError("cooperation belongs to prior='paper'; the hierarchical prior has no such term.")

    def sample_weight(self, site: Site) -> Tensor:
        """Sample Sigma, pi and the columns of one site; (layers, columns, rank)."""
        layers, _, rank = site.initial.shape
        where = site.initial.dtype, site.initial.device
        factor = pyro.sample(f"{site.name}.scale_tril", wishart_prior(self.degrees(rank), layers, rank, *where))
        mixture = pyro.sample(f"{site.name}.mixture", mixture_prior(self.alpha0, layers, self.components, *where))
        if self.prior == "hierarchical":
            law = self.column_law(self.prior_mean(site), self.unit(site), mixture, factor)
        elif self.collapse:
            law = ColumnNormal(self.prior_mean(site), self.sigma0(site), validate_args=False).to_event(1)
        else:
            law = self.column_law(self.prior_mean(site), self.sigma0(site) / length(mixture), mixture)
        if self.cooperation:
            pyro.factor(f"{site.name}.cooperation", -self.cooperation * mixture.square().sum())
        if self.collapse:
            return pyro.sample(site.name, law)
        components = pyro.sample(f"{site.name}.components", law)
        return pyro.deterministic(site.name, weighted_sum(mixture, components))

    def latents(self, site: Site) -> dict[str, Tensor]:
        """Sigma = I, pi uniform, and the matrix at the start (in every component)."""
        layers, columns, rank = site.initial.shape
        values = {
            f"{site.name}.scale_tril": torch.eye(rank).to(site.initial).expand(layers, rank, rank),
            f"{site.name}.mixture": site.initial.new_full((layers, self.components), 1 / self.components),
        }
        if self.collapse:
            return values | {site.name: site.start}
        components = site.start.unsqueeze(1).expand(layers, self.components, columns, rank)
        return values | {f"{site.name}.components": components}

    def weights(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, by site; components are summed, hyper-sites left out."""
        weights = {}
        for name, value in values.items():
            owner, _, kind = name.rpartition(".")
            if kind == "components":
                weights[owner] = weighted_sum(values[f"{owner}.mixture"], value)
            elif kind not in ("scale_tril", "mixture"):
                weights[name] = value
        return weights

    def site_guide(self, site: Site) -> MonteCLoRAGuide:
        """The paper's guide: see `MonteCLoRAGuide`."""
        return MonteCLoRAGuide(self, site)

    def degrees(self, rank: int) -> float:
        """Degrees of freedom of the Wishart law at a rank.

        Raises:
            SettingError: ``nu`` is too small for the law, or for the covariance to have a mean.
        """
        nu = 2 * rank + 3 if self.nu is None else self.nu
        least = rank - 1 if self.wishart_on == "covariance" else rank + 1
        if not nu > least:
            raise SettingError(
                f"nu={nu} must exceed {least} at rank {rank} with the Wishart law on the {self.wishart_on}."
            )
        return float(nu)

    def unit(self, site: Site) -> Tensor:
        """Scale s, (layers, 1, 1), for which a ~ N(centre, s^2 |pi|^2 Sigma) has the prior variance sigma0^2."""
        rank = site.initial.shape[-1]
        mean_square = (self.alpha0 + 1) / (self.components * self.alpha0 + 1)
        nu = self.degrees(rank)
        mean_covariance = 1.0 if self.wishart_on == "covariance" else nu / (nu - rank - 1)
        return self.sigma0(site) / math.sqrt(mean_square * mean_covariance)

    def column_law(
        self, loc: Tensor, scale: Tensor, mixture: Tensor, factor: Tensor | None = None
    ) -> dist.TorchDistribution:
        """Law N(loc, scale^2 |pi|^2 Sigma) of the columns or, expanded, the law N(loc, scale^2 Sigma) of components.

        Args:
            loc: means (layers, columns, rank).
            scale: (layers, 1, 1).
            mixture: pi, (layers, components).
            factor: Cholesky factor (layers, rank, rank) of Sigma or its inverse; Sigma = I if left out.
        """
        key = "scale_tril" if self.wishart_on == "covariance" else "precision_tril"
        if self.collapse:
            law = ColumnNormal(loc, scale, **{key: factor}, mixture=mixture, validate_args=False)
            return law.to_event(1)
        shared = {key: None if factor is None else factor.unsqueeze(1)}
        law = ColumnNormal(loc.unsqueeze(1), scale.unsqueeze(1), **shared, validate_args=False)
        return law.expand((len(loc), self.components)).to_event(2)


class MonteCLoRAGuide(MatrixGuide):
    r"""Posterior family of one site: q(Sigma) q(pi) prod_i N(a_i | mu_i, (eps s)^2 \|pi\|^2 Sigma).

    q(Sigma) is Wishart with the prior's degrees of freedom and mean diag(v), q(pi) Dirichlet; s is the prior's own
    scale, so that the guide starts at the prior's spread times ``eps``. Besides mu it has rank + components learned
    numbers a layer (one more with ``learn_eps``).
    """

    unit: Tensor

    def __init__(self, model: MonteCLoRA, site: Site) -> None:
        super().__init__(site, model.latents(site))
        layers, _, rank = site.initial.shape
        self.model = model
        self.nu = model.degrees(rank)
        self.log_v = nn.Parameter(site.initial.new_zeros(layers, rank))
        self.log_alpha = nn.Parameter(site.initial.new_full((layers, model.components), math.log(model.alpha0)))
        log_eps = site.initial.new_full((layers, 1, 1), math.log(model.eps))
        if model.learn_eps:
            self.log_eps = nn.Parameter(log_eps)
        else:
            self.register_buffer("log_eps", log_eps)
        self.register_buffer("unit", model.unit(site))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample Sigma's factor, pi, and the columns or components given both."""
        scale = (self.log_v / 2).exp() / math.sqrt(self.nu)
        wishart = DiagonalWishartCholesky(self.nu, scale, validate_args=False).to_event(1)
        factor = pyro.sample(f"{self.name}.scale_tril", wishart)
        dirichlet = dist.Dirichlet(self.log_alpha.exp(), validate_args=False).to_event(1)
        mixture = pyro.sample(f"{self.name}.mixture", dirichlet)
        law = self.model.column_law(self.mu, self.unit * self.log_eps.exp(), mixture, factor)
        columns = pyro.sample(self.latents[-1], law)
        return dict(zip(self.latents, (factor, mixture, columns), strict=True))

    def spreads(self) -> dict[str, Spread]:
        """Independent columns around mu, given Sigma and pi."""
        return {self.name: Spread(self.mu)}


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # a tensor of that mode could be in no graph later
def wishart_prior(nu: float, layers: int, rank: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Law of the factors of Wishart matrices with mean I, one a layer; made once, since all steps ask for it."""
    scale = torch.ones(layers, rank, dtype=dtype, device=device) / math.sqrt(nu)
    return DiagonalWishartCholesky(nu, scale, validate_args=False).to_event(1)


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def mixture_prior(alpha0: float, layers: int, components: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Dirichlet law of pi with one concentration, one a layer; made once as well."""
    concentration = torch.full((layers, components), alpha0, dtype=dtype, device=device)
    return dist.Dirichlet(concentration, validate_args=False).to_event(1)


def length(mixture: Tensor) -> Tensor:
    """Euclidean length of pi, (layers, components) to (layers, 1, 1)."""
    return torch.linalg.vector_norm(mixture, dim=-1)[..., None, None]


def weighted_sum(mixture: Tensor, components: Tensor) -> Tensor:
    """sum_k pi_k z_k: (layers, components) and (layers, components, columns, rank) to (layers, columns, rank)."""
    return torch.einsum("lk,lknr->lnr", mixture, components)
