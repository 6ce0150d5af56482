"""What all models of LoRA weights share: which sites are random, their prior scale, and the point estimates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from bayeslora.models.distributions import IsotropicNormal
from bayeslora.models.guides.base import Guide, GuideList, PointGuide
from bayeslora.settings import Deviation, Settings
from bayeslora.sites import Site

__all__ = ["WeightModel", "full_precision"]


@dataclass(frozen=True, kw_only=True)
class WeightModel(Settings, ABC):
    """A Pyro model of LoRA weights: the LoRA matrices of ``sites`` are random, all other weights point estimates.

    The random sites are sampled first and the others after them, in the model as in every guide.

    Figures below are accuracy / NLL / ECE-15 of `svi` with MonteCLoRA on SST-2 (MiniLM, 1,000 training rows, 10 epochs
    at 2e-3, one seed, 1,000 other rows, where accuracy has a standard error of 0.012; the study is
    ``benchmarks/studies/settings.yaml``), without `SVI.noise_warmup`, under prior means that are the model's
    (`SVI.prior_mean`). With ``scale=1.5`` and all else as by default they are .842 / .364 / .030; plain LoRA has .836 /
    .961 / .146.

    A Kullback-Leibler weight of 1, Bayes' rule, is usable by a prior around the initial matrix and noise as large as
    the prior's, in one of the two matrices. Neither the hierarchical Sigma (`Gaussian`: .842 / .348 / .024), nor a
    learned noise scale, nor a rising weight (`MonteCLoRA.learn_eps`, `SVI.kl_warmup`) is needed for it.

    Attributes:
        sites: which LoRA matrices are random: "A", "B" or "both" (.590 / .662 / .129: noise in both hides the signal).
        centre: prior mean of a random matrix: "init", its initial value, or "zero". LoRA starts A at random, and a
            prior around zero charges A for its random start (.818 / .443 / .096).
        scale: prior standard deviation of an entry, as a multiple of the root mean square of the layer's initial
            matrix. Large: honest but slow to learn (2: .829 / .390 / .023); small: towards plain LoRA (1: .838 / .357 /
            .044; 0.3: .828 / .565 / .110). Where prior means are learned, A grows beside its noise, and bears more.
        zero_scale: prior standard deviation of an entry, in the weight's own unit, where the initial matrix is zero (B
            of a fresh adapter).
        eps: standard deviation of the structured guide's noise at the start, as a multiple of the prior's. At 1 the
            noise costs nothing and a Kullback-Leibler weight of 1 is usable; less overfits (0.3: .826 / .578 / .109;
            with scale=3, which is noise of the size of scale=1 under a wider prior, .835 / .442 / .080).
        weight_scale: standard deviation of the zero-mean normal prior of LoRA matrices that are point estimates (0.1:
            .814 / .426 / .075), and of that of all other tensors around their initial values.
        head_scale: the same for the head.
        deviation: prior standard deviation of an entry in the weight's own unit, in all layers, in place of ``scale``
            and ``zero_scale``: lambda^(-1/2) where others have a prior precision lambda.
    """

    name: ClassVar[str]

    sites: Literal["A", "B", "both"] = "A"
    centre: Literal["init", "zero"] = "init"
    scale: Deviation = 2.5
    zero_scale: Deviation = 0.02
    eps: Deviation = 1.0
    weight_scale: Deviation = 1.0
    head_scale: Deviation = 1.0
    deviation: Deviation | None = None

    def sample(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Sample every latent site in Pyro.

        Returns:
            The weight of each site by its name, in the shape of ``Site.initial``.
        """
        chosen, others = self.split(sites)
        with full_precision(sites[0].initial.device if sites else torch.device("cpu")):
            weights = {site.name: self.sample_weight(site) for site in chosen}
            weights.update((site.name, pyro.sample(site.name, self._point_prior(site))) for site in others)
        return weights

    def prior_laws(self, sites: Sequence[Site]) -> dict[str, dist.TorchDistribution]:
        """Law of each latent site under the prior, given those before it, by a draw that leaves generators alone."""
        with torch.random.fork_rng():
            trace = poutine.block(poutine.trace(self.sample).get_trace)(sites)
        return {name: node["fn"] for name, node in trace.iter_stochastic_nodes()}

    def stochastic(self, sites: Sequence[Site]) -> set[str]:
        """Names of the latent sites, hyper-sites included, that are random; all others are point estimates."""
        return {name for site in self.split(sites)[0] for name in self.latents(site)}

    def initial(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Starting value of every latent site, in the order in which the prior samples them."""
        chosen, others = self.split(sites)
        values = {name: value for site in chosen for name, value in self.latents(site).items()}
        return values | {site.name: site.start for site in others}

    def weights(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, by site, that values of the latent sites determine; hyper-sites are left out."""
        return dict(values)

    def guide(self, sites: Sequence[Site]) -> Guide:
        """The structured guide: this model's own posterior family for random sites, points for the others."""
        chosen, others = self.split(sites)
        points = PointGuide({site.name: site.start for site in others})
        return GuideList([*(self.site_guide(site) for site in chosen), points])

    def split(self, sites: Sequence[Site]) -> tuple[list[Site], list[Site]]:
        """The sites that are random, and the others."""
        roles = ("A", "B") if self.sites == "both" else (self.sites,)
        return [site for site in sites if site.role in roles], [site for site in sites if site.role not in roles]

    def sigma0(self, site: Site) -> Tensor:
        """Prior standard deviation of an entry, (layers, 1, 1): each layer's own, so that grouping has no effect."""
        size = site.size
        if self.deviation is not None:
            return torch.full_like(size, self.deviation)
        return deviations(size, self.scale, self.zero_scale)

    def prior_mean(self, site: Site) -> Tensor:
        """Prior mean of a random matrix, (layers, columns, rank) or broadcastable to it."""
        if site.centre is not None:
            return site.centre
        return site.initial if self.centre == "init" else torch.zeros_like(site.initial)

    @abstractmethod
    def sample_weight(self, site: Site) -> Tensor:
        """Sample a random matrix and its hyper-sites in Pyro; (layers, columns, rank)."""

    @abstractmethod
    def latents(self, site: Site) -> dict[str, Tensor]:
        """Starting value of each latent site of a random matrix, in sampling order."""

    @abstractmethod
    def site_guide(self, site: Site) -> Guide:
        """The structured guide of a random matrix and its hyper-sites."""

    def _point_prior(self, site: Site) -> dist.TorchDistribution:
        if site.role == "tensor":  # of a network that was trained before, or a scale of one
            return dist.Normal(site.initial, self.weight_scale, validate_args=False).to_event(site.initial.dim())
        scale = self.head_scale if site.role == "head" else self.weight_scale
        return point_prior(scale, site.initial.shape, site.initial.dtype, site.initial.device)


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # a tensor of that mode could be in no graph later
def deviations(size: Tensor, scale: float, zero_scale: float) -> Tensor:
    """Prior standard deviations (layers, 1, 1) by the size of each layer's matrix; made once, since all steps ask."""
    return torch.where(size > 0, scale * size, zero_scale)


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def point_prior(scale: float, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> IsotropicNormal:
    """Law of a point estimate; made once as well."""
    return IsotropicNormal(torch.full((), scale, dtype=dtype, device=device), shape, validate_args=False)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Context without automatic mixed precision: factors of covariances do not survive 8 bits of mantissa."""
    # One that changes nothing is not free: there are several in a step of training.
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
