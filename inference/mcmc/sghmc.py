"""Stochastic gradient Hamiltonian Monte Carlo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bayeslora.inference.mcmc.sgld import SGLD, Move
from bayeslora.settings import Positive

__all__ = ["SGHMC"]


@dataclass(frozen=True)
class SGHMC(SGLD):
    """Stochastic gradient Hamiltonian Monte Carlo: Langevin dynamics with a momentum, which goes further in a step.

    v <- (1 - friction) v + h gradient + N(0, 2 friction h), theta <- theta + v: equation 15, the noise of the gradient
    not corrected for.

    Attributes:
        friction: part of the momentum that a step loses.

    References:
        Chen, Fox and Guestrin, *Stochastic gradient Hamiltonian Monte Carlo*, ICML 2014.
    """

    name: ClassVar[str] = "sghmc"
    paper: ClassVar[str] = "Chen, Fox and Guestrin, ICML 2014"

    step_size: Positive = 1e-4
    friction: Annotated[float, Field(gt=0, le=1)] = 0.1

    def mover(self, place: Mapping[str, Tensor], spread: Mapping[str, float]) -> Move:
        """The same with a momentum, which begins at zero."""
        momentum = {name: torch.zeros_like(value) for name, value in place.items()}

        def move(gradients: Sequence[Tensor]) -> None:
            for (name, value), gradient in zip(place.items(), gradients, strict=True):
                step = self.step_size * spread[name] ** 2
                kick = step * gradient + (2 * self.friction * step) ** 0.5 * torch.randn_like(value)
                value.add_(momentum[name].mul_(1 - self.friction).add_(kick))

        return move
