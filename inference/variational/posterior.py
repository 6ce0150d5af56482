"""Posteriors that are guides: the distribution that a guide has become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.inference.softening import Softened, without
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide
from bayeslora.predictors import Pairs
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.sites import Site

__all__ = ["PriorMean", "VariationalPosterior", "prior_sites"]

#: What the prior means of random matrices are: the model's, or learned with all else (empirical Bayes).
PriorMean = Literal["learned", "model"]


class VariationalPosterior(Softened):
    """The distribution that a guide has become.

    Attributes:
        guide: that distribution.
    """

    kind: ClassVar[str] = "variational"
    # The noise is what the guide does not know: that it knows more than that, a few rows say by chance at times. But
    # choices by the likelihood of their texts may all be too unsure, with noise and without.
    coldest = 1.0

    def __init__(self, program: Program, record: Record, guide: Guide) -> None:
        super().__init__(program, record)
        self.guide = guide
        self.random = guide.random
        if guide.spreads() and "sample" in self.predictors:
            self.predictors = {"pairs": Pairs(), **self.predictors}

    def _prior(self) -> dict[str, Tensor]:
        return self.program.prior(prior_sites(self.program, self.guide, self._prior_mean))

    @property
    def learned_means(self) -> tuple[str, ...]:
        """Those that the guide has a parameter for, if they were learned."""
        return () if self._prior_mean == "model" else tuple(self.guide.centres())

    @property
    def _prior_mean(self) -> PriorMean:
        found: PriorMean = self.record.settings.get("prior_mean", "model")
        return found

    def noise_scales(self) -> dict[str, Tensor]:
        """The guide's."""
        return self.guide.noise_scales()

    @property
    def dense(self) -> bool:
        """Whether the guide's density is known."""
        return self.guide.dense

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """The guide's."""
        return self.guide.auxiliary

    @property
    def independent_layers(self) -> bool:
        """Whether the guide has no correlations between layers."""
        return self.guide.independent_layers

    def draw(self) -> dict[str, Tensor]:
        """One draw of every latent site of the model, with what is auxiliary, and the weights it implies."""
        with torch.no_grad(), torch.autocast(self.program.device.type, enabled=False):
            drawn = self.guide.draw()
            return drawn | self.program.model.weights({name: drawn[name] for name in self.guide.latents})

    def pairs(self, n: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield ``n`` draws of the weights, every second one the mirror image of the one before.

        Given the guide's other sites, its matrices are as likely there: see `Spread`.
        """
        return islice(self._mirrored(self.draws(-(-n // 2), seed)), n)

    def _mirrored(self, draws: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The weights of each draw, and of its mirror image."""
        means = {name: spread.mean.detach() for name, spread in self.guide.spreads().items()}
        for draw in draws:
            weights = {site.name: draw[site.name] for site in self.program.sites}
            yield weights
            yield weights | {name: 2 * mean - weights[name] for name, mean in means.items()}

    def mean(self) -> dict[str, Tensor]:
        """The guide's mean of the weights, by site."""
        return self.guide.mean()

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of the guide at the values of the latent sites.

        Raises:
            PosteriorError: the guide has no density, such as a point estimate, or a value is missing.
        """
        with torch.no_grad():
            return self.guide.log_prob(dict(values))

    def state(self) -> dict[str, Tensor]:
        """The guide's parameters, and the temperature of predictions, if there is one."""
        return super().state() | dict(self.guide.state_dict())

    @classmethod
    def from_state(cls, program: Program, record: Record, state: Mapping[str, Tensor]) -> VariationalPosterior:
        """Make the guide that the record names, and load its parameters.

        Raises:
            PosteriorError: the parameters do not fit the guide.
        """
        guide = cls.blank(program, record)
        try:
            guide.load_state_dict(without(state))
            for name, value in guide.state_dict().items():
                if value.is_floating_point() != state[name].is_floating_point():
                    raise TypeError(f"{name} is of {state[name].dtype}")
        except (RuntimeError, TypeError) as error:
            name = record.settings.get("guide", record.backend)
            raise PosteriorError(f"The saved parameters do not fit the guide '{name}': {error}") from error
        posterior = cls(program, record, guide.to(program.device))
        posterior.soften_as(state)
        return posterior

    @classmethod
    def blank(cls, program: Program, record: Record) -> Guide:
        """The guide that a record names, before its saved parameters are in it."""
        kind, init_scale = record.settings.get("guide", "delta"), record.settings.get("init_scale", 1e-2)
        return make_guide(kind, program.model, program.sites, init_scale, record.settings.get("guide_settings"))


def prior_sites(program: Program, guide: Guide, prior_mean: PriorMean) -> Sequence[Site]:
    """The sites of a program, as its prior is to see them.

    Args:
        program: whose sites.
        guide: over them.
        prior_mean: "model": as the program has them; "learned": each random matrix around the guide's own mean, where
            that is a parameter. Of all prior means it is the one at which the bound is largest.
    """
    if prior_mean == "model":
        return program.sites
    centres = guide.centres()
    return [replace(site, centre=centres.get(site.name)) for site in program.sites]
