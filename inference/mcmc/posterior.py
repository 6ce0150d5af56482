"""Posteriors that are a set of draws: what a Markov chain leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.record import Record

__all__ = ["EmpiricalPosterior"]


class EmpiricalPosterior(Posterior):
    """The empirical distribution of the draws of a chain.

    Args:
        program: the program.
        record: how the posterior came about.
        chain: values (draws, ...) of every latent site, in the order in which they were drawn.
    """

    kind: ClassVar[str] = "empirical"
    markov = True

    def __init__(self, program: Program, record: Record, chain: Mapping[str, Tensor]) -> None:
        super().__init__(program, record)
        self.chain = dict(chain)

    @property
    def most_draws(self) -> int:
        """As many as the chain has kept."""
        return len(self)

    def __len__(self) -> int:
        return len(next(iter(self.chain.values())))

    @property
    def dense(self) -> bool:
        """Draws have no density."""
        return False

    def draw(self) -> dict[str, Tensor]:
        """One of the draws, each as likely as any other."""
        return self._at(int(torch.randint(len(self), ())))

    def draws(self, n: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """So many of the draws, in their order and evenly spaced, whatever the seed.

        Raises:
            PosteriorError: there are not so many.
        """
        if n > len(self):
            raise PosteriorError(f"This chain has {len(self)} draws, and {n} were asked for.")
        for place in torch.linspace(0, len(self) - 1, n).round().int().tolist():
            yield self._at(place)

    def mean(self) -> dict[str, Tensor]:
        """The average of the weights over all draws, by site."""
        total = {site.name: torch.zeros_like(site.initial) for site in self.program.sites}
        for draw in self.draws(len(self)):
            total = {name: value + draw[name] for name, value in total.items()}
        return {name: value / len(self) for name, value in total.items()}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Draws have no density.

        Raises:
            PosteriorError: always.
        """
        raise PosteriorError(f"The posterior of '{self.record.backend}' is a set of draws: it has no density.")

    def state(self) -> dict[str, Tensor]:
        """The chain's draws, by site."""
        return self.chain

    @classmethod
    def from_state(cls, program: Program, record: Record, state: Mapping[str, Tensor]) -> EmpiricalPosterior:
        """Take the draws.

        Raises:
            PosteriorError: they are not as many floats for every site.
        """
        wrong = [name for name, values in state.items() if not values.is_floating_point() or not values.dim()]
        if wrong or len({len(values) for values in state.values()}) != 1:
            raise PosteriorError(f"The saved draws are not as many floats for each of {', '.join(wrong or state)}.")
        return cls(program, record, state)

    def _at(self, place: int) -> dict[str, Tensor]:
        latents = {name: values[place] for name, values in self.chain.items()}
        return latents | self.program.weights_at(latents)
