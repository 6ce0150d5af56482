"""How long a step of a Langevin chain may be: the curvature of its target, and the noise of its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gradient", "Meter", "Stiffness", "joined"]

#: Gradient (entries,) of a log density, so far (entries,) from where a chain is, as a batch of rows estimates it.
Gradient = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
#: Steps of a measurement's power iteration, which goes on from where the one before it ended.
ITERATIONS = 6
#: How far gradients are compared, in the prior's standard deviations: the posterior's along a curvature of 10,000.
DISTANCE = 1e-2


@dataclass(frozen=True)
class Stiffness:
    """What widens the stationary law of a Langevin chain with a step that stays, each along its worst direction.

    Attributes:
        curvature: largest eigenvalue, by size, of the Hessian of the log density.
        noise: that of the covariance of the gradient as a batch estimates it.
    """

    curvature: float
    noise: float


class Meter:
    """Measures stiffness where a chain is.

    Args:
        gradient: of the chain's log density.
        entries: of which it is.
    """

    def __init__(self, gradient: Gradient, entries: Tensor) -> None:
        self._gradient = gradient
        self._here = torch.zeros_like(entries)
        self._direction = torch.randn_like(entries)

    def __call__(self, batches: Sequence[Mapping[str, Tensor]]) -> Stiffness:
        """Measure, by some batches.

        Their gradients' covariance has the eigenvalues of its Gram matrix, which is of as many rows as there are
        batches: of few batches the largest one is too large, if anything. The Hessian is applied by the difference of
        two gradients, and its largest eigenvalue found by power iteration.
        """
        gradients = torch.stack([self._gradient(self._here, batch) for batch in batches])
        if not torch.isfinite(gradients).all():
            return Stiffness(math.inf, 0.0)  # no step is short enough here
        mean = gradients.mean(0)
        apart = gradients - mean
        noise = torch.linalg.eigvalsh(apart @ apart.T)[-1] / max(len(batches) - 1, 1)
        curvature = torch.zeros(())
        for _ in range(ITERATIONS):
            unit = self._direction / self._direction.norm()
            away = torch.stack([self._gradient(DISTANCE * unit, batch) for batch in batches]).mean(0)
            self._direction = (away - mean) / DISTANCE
            curvature = self._direction.norm()
        return Stiffness(float(curvature), max(float(noise), 0.0))


def joined(values: Mapping[str, Tensor]) -> Tensor:
    """All entries in one row."""
    return torch.cat([value.detach().flatten() for value in values.values()])
