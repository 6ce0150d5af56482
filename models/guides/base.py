"""Guides: families of posteriors over the weights, with all parameters in ordinary `torch.nn.Parameter`s.

A guide of the whole model is a list of smaller guides, one after another in the order of the model's sites: what the
model itself proposes (structured), one of Pyro's autoguides (`bayeslora.models.guides.auto`), and point estimates.
Pyro's global parameter store is never written, so two posteriors can live side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from bayeslora.errors import PosteriorError
from bayeslora.settings import Settings
from bayeslora.sites import Site

Value = TypeVar("Value")
Combine = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

__all__ = ["Guide", "GuideList", "MatrixGuide", "PointGuide", "Spread", "decoded", "encoded"]


class Spread(NamedTuple):
    """How draws of a random matrix lie around its mean, given those of the guide's other sites.

    Its columns are independent, and each is as likely as its mirror image on the other side of the mean.

    Attributes:
        mean: (layers, columns, rank), a function of the guide's parameters.
        deviation: standard deviation of each entry, broadcastable to the mean, if entries are independent and normal;
            None if those of a column depend on each other.
    """

    mean: Tensor
    deviation: Tensor | None = None


class Guide(nn.Module, ABC):
    """A distribution over some of the latent sites of a model.

    Attributes:
        latents: names of the latent sites, in the order in which they are sampled.
        random: whether any of them is more than a point.
        dense: whether `log_prob` gives a density.
        auxiliary: names of values that `draw` gives besides, if the density is known with those alone: see `log_prob`.
        independent_layers: whether it has no correlations between the network's layers.
        settings: dataclass of its settings, which is what it is made of beside a model and sites, if it has any.
    """

    random: bool = True
    dense: bool = True
    auxiliary: tuple[str, ...] = ()
    independent_layers: bool = True
    settings: ClassVar[type[Settings] | None] = None

    def __init__(self, latents: Iterable[str]) -> None:
        super().__init__()
        self.latents = tuple(latents)

    @property
    def point_sites(self) -> tuple[str, ...]:
        """Names of the latent sites that have the same value in every draw."""
        return () if self.random else self.latents

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site in Pyro; the arguments (those of the model) are not used."""

    def draw(self) -> dict[str, Tensor]:
        """One value of every latent site, and of what is `auxiliary`, detached from the graph."""
        nodes = poutine.trace(self).get_trace().nodes
        return {name: nodes[name]["value"].detach() for name in self.latents}  # a point is the parameter itself

    @abstractmethod
    def mean(self) -> dict[str, Tensor]:
        """The weights at the posterior mean, by site, detached from the graph."""

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density, a scalar, at one value of each latent site; a point estimate adds zero.

        With values U that are `auxiliary` it is log q(w, U) - log r(U | w), where r is a law of U given w. As that of
        p(w) / q(w), where q(w) is not known, the mean of p(w) r(U | w) / q(w, U) under q is what p integrates to.

        Raises:
            PosteriorError: the guide has no density, or the value of a site is missing.
        """
        self._require(values)
        trace = poutine.trace(poutine.condition(self.forward, data=values)).get_trace()
        return torch.as_tensor(trace.log_prob_sum())

    def noise_scales(self) -> dict[str, Tensor]:
        """Size of the noise in each layer as a multiple of the prior's, by name, where the guide keeps that."""
        return {}

    def spreads(self) -> dict[str, Spread]:
        """How random matrices lie around their means, by site, as far as all is known that `Spread` says."""
        return {}

    def centres(self) -> dict[str, nn.Parameter]:
        """Means of random matrices by site, where they are parameters: at these prior means the bound is largest."""
        return {}

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The learned parameters by what they are.

        "location": means of random weights; "scale": what shapes their noise; "point": weights that are point
        estimates.
        """

    def _require(self, values: Mapping[str, Tensor]) -> None:
        missing = [name for name in (*self.latents, *self.auxiliary) if name not in values]
        if missing:
            raise PosteriorError(
                f"The density needs a value of '{missing[0]}' ({len(missing)} sites missing); "
                f"found {', '.join(sorted(values)) or 'none'}."
            )


class MatrixGuide(Guide):
    """What structured guides of one random matrix share: learned means, and noise in multiples ``eps`` of the prior's.

    Args:
        site: of the matrix, at whose start the means begin.
        latents: of the matrix and its hyper-sites.
    """

    log_eps: Tensor

    def __init__(self, site: Site, latents: Iterable[str]) -> None:
        super().__init__(latents)
        self.name = site.name
        self.mu = nn.Parameter(site.start.clone())

    def mean(self) -> dict[str, Tensor]:
        """The means mu, (layers, columns, rank)."""
        return {self.name: self.mu.detach().clone()}

    def centres(self) -> dict[str, nn.Parameter]:
        """The means mu."""
        return {self.name: self.mu}

    def noise_scales(self) -> dict[str, Tensor]:
        """Eps: (layers, columns or 1, rank or 1)."""
        return {f"{self.name}.eps": self.log_eps.detach().exp()}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The means under "location", all else that is learned under "scale"."""
        return {"location": [self.mu], "scale": [value for name, value in self.named_parameters() if name != "mu"]}


class GuideList(Guide):
    """Independent guides over different sites, sampled one after another.

    Args:
        parts: the guides.
        combine: map from the means of their sites to the weights they determine; themselves, if left out.
    """

    def __init__(self, parts: Sequence[Guide], combine: Combine = dict) -> None:
        super().__init__(name for part in parts for name in part.latents)
        self._combine = combine
        self.parts = nn.ModuleList(parts)
        self.random = any(part.random for part in parts)
        self.dense = self.random and all(part.dense for part in parts if part.random)
        self.auxiliary = tuple(name for part in parts for name in part.auxiliary)
        self.independent_layers = all(part.independent_layers for part in parts)

    @property
    def point_sites(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(name for part in self._guides() for name in part.point_sites)

    def _guides(self) -> list[Guide]:
        return cast("list[Guide]", list(self.parts))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the sites of every part."""
        return _merged(part(*args, **kwargs) for part in self._guides())

    def draw(self) -> dict[str, Tensor]:
        """Values of the sites of every part."""
        return _merged(part.draw() for part in self._guides())

    def mean(self) -> dict[str, Tensor]:
        """The means of all parts."""
        return self._combine(_merged(part.mean() for part in self._guides()))

    def noise_scales(self) -> dict[str, Tensor]:
        """That of all parts."""
        return _merged(part.noise_scales() for part in self._guides())

    def centres(self) -> dict[str, nn.Parameter]:
        """Those of all parts."""
        return _merged(part.centres() for part in self._guides())

    def spreads(self) -> dict[str, Spread]:
        """Those of all parts."""
        return {name: spread for part in self._guides() for name, spread in part.spreads().items()}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sum over the parts that are more than points.

        Raises:
            PosteriorError: all are points, a part has no density, or the value of a site is missing.
        """
        parts = [part for part in self._guides() if part.random] or self._guides()
        return torch.stack([part.log_prob(values) for part in parts]).sum()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The groups of all parts, joined."""
        groups = [part.parameter_groups() for part in self._guides()]
        names = dict.fromkeys(name for group in groups for name in group)
        return {name: [value for group in groups for value in group.get(name, [])] for name in names}


class PointGuide(Guide):
    """Point estimates (Delta distributions) of latent sites, as in maximum a posteriori estimation.

    Args:
        values: starting value of each site.
        fixed: names of sites that keep it.
        located: names of sites whose points learn at the rate of means.
        combine: map from the values of the sites to the weights they determine; themselves, if left out.
    """

    random = dense = False

    def __init__(
        self,
        values: Mapping[str, Tensor],
        fixed: Collection[str] = (),
        located: Collection[str] = (),
        combine: Combine = dict,
    ) -> None:
        super().__init__(values)
        self._located = {encoded(name) for name in located}
        self._combine = combine
        self.points = nn.ParameterDict(
            {
                encoded(name): nn.Parameter(value.detach().clone(), requires_grad=name not in fixed)
                for name, value in values.items()
            }
        )

    def values(self) -> dict[str, Tensor]:
        """The current value of every site."""
        return {name: self.points[encoded(name)] for name in self.latents}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Declare each point as a Delta site."""
        return {
            name: pyro.sample(name, dist.Delta(value, event_dim=value.dim(), validate_args=False))
            for name, value in self.values().items()
        }

    def centres(self) -> dict[str, nn.Parameter]:
        """The points that stand for means."""
        return {name: self.points[encoded(name)] for name in self.latents if encoded(name) in self._located}

    def mean(self) -> dict[str, Tensor]:
        """The current values of the weights."""
        return self._combine({name: value.detach().clone() for name, value in self.values().items()})

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """A point has no density.

        Raises:
            PosteriorError: always.
        """
        raise PosteriorError("This guide is a point estimate of every site: it has no density to evaluate.")

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The points that learn: those that stand for means under "location", and the others under "point"."""
        groups: dict[str, list[nn.Parameter]] = {"location": [], "point": []}
        for name, value in self.points.items():
            if value.requires_grad:
                groups["location" if name in self._located else "point"].append(value)
        return groups


def encoded(name: str) -> str:
    """Name of a site as a key of a module, where "." is not allowed."""
    return name.replace(".", "/")


def decoded(name: str) -> str:
    """Name of the site behind a key of a module."""
    return name.replace("/", ".")


def _merged(parts: Iterable[dict[str, Value]]) -> dict[str, Value]:
    return {name: value for part in parts for name, value in part.items()}
