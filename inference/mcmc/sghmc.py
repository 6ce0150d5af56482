"""Stochastic gradient Hamiltonian Monte Carlo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bayeslora.inference.mcmc.sgld import SGLD, Move
from bayeslora.inference.mcmc.steps import Stiffness

__all__ = ["SGHMC"]


@dataclass(frozen=True, kw_only=True)
class SGHMC(SGLD):
    """Stochastic gradient Hamiltonian Monte Carlo: Langevin dynamics with a momentum, which goes further in a step.

    v <- (1 - friction) v + h gradient + N(0, 2 friction h), theta <- theta + v: equation 15, the noise of the gradient
    not corrected for. With friction f, precision l and a gradient of variance v the chain has the variance
    (1 + h v / (2 f)) / (1 - h l / (4 - 2 f)) / l, from which h follows as for `SGLD`.

    Attributes:
        friction: part of the momentum that a step loses.

    References:
        Chen, Fox and Guestrin, *Stochastic gradient Hamiltonian Monte Carlo*, ICML 2014.
    """

    name: ClassVar[str] = "sghmc"
    paper: ClassVar[str] = "Chen, Fox and Guestrin, ICML 2014"

    friction: Annotated[float, Field(gt=0, le=1)] = 0.1

    def mover(self, place: Mapping[str, Tensor], spread: Mapping[str, float]) -> Move:
        """The same with a momentum, which begins at zero."""
        momentum = {name: torch.zeros_like(value) for name, value in place.items()}

        def move(gradients: Sequence[Tensor], size: float) -> None:
            for (name, value), gradient in zip(place.items(), gradients, strict=True):
                step = size * spread[name] ** 2
                kick = step * gradient + (2 * self.friction * step) ** 0.5 * torch.randn_like(value)
                value.add_(momentum[name].mul_(1 - self.friction).add_(kick))

        return move

    def longest(self, stiffness: Stiffness, bias: float) -> float:
        """The longest step that widens the variance by no more than a part of it."""
        curvature = (1 + bias) * stiffness.curvature / (4 - 2 * self.friction)
        return bias / (stiffness.noise / (2 * self.friction) + curvature)

    def drift(self, size: float) -> float:
        """Part of the way to the prior's mean that a step goes in the long run where the data say nothing."""
        return size / self.friction
