"""Noise in A whose effect on the product B A is isotropic: the guide of training-free Bayesianization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayeslora.models.guides.base import Guide
from bayeslora.sites import Site

__all__ = ["ProductNoise", "spectral_noise"]

#: Singular values of B, as parts of the layer's largest, up to which B is taken not to reach a direction.
NEGLIGIBLE = 1e-3


def spectral_noise(b: Tensor, sigma: float, unreached: Tensor) -> tuple[Tensor, Tensor]:
    r"""Noise in the columns of A by which that of B A has one deviation in all directions that B reaches.

    With B = U diag(d) V^T, a column of A gets the covariance V diag(s^2) V^T with s_i = sigma / d_i, and one of B A
    sigma^2 U U^T. A direction V_i that B does not reach, of d_i near zero, moves no product and so no prediction, and
    the formula has no s_i for it. Given B, the posterior is the prior there, and so s_i is the prior's deviation.

    Args:
        b: matrices (layers, outputs, rank).
        sigma: deviation of B A in each direction that B reaches.
        unreached: deviation (layers, 1, 1) of A in all others.

    Returns:
        V^T (layers, rank, rank) and s (layers, rank).
    """
    outputs, rank = b.shape[-2:]
    # Whole matrices where the frame would lack rows; else they would be outputs x outputs, as wide as a vocabulary.
    _, found, frame = torch.linalg.svd(b.double(), full_matrices=outputs < rank)
    d = found.new_zeros(frame.shape[:-1])
    d[:, : found.shape[-1]] = found  # at a rank above the number of outputs there are fewer than directions
    reached = d > NEGLIGIBLE * d.amax(-1, keepdim=True)
    deviations = torch.where(reached, sigma / d.where(reached, 1.0), unreached.double().squeeze(-1))
    return frame.to(b), deviations.to(b)


class ProductNoise(Guide):
    """A matrix A with normal noise, independent in the columns and, in a column, in the directions of a frame.

    Args:
        site: of A.
        mean: (layers, columns, rank).
        frame: orthonormal rows (layers, rank, rank).
        deviations: of the noise along each row, (layers, rank).
    """

    mu: Tensor
    frame: Tensor
    deviations: Tensor

    def __init__(self, site: Site, mean: Tensor, frame: Tensor, deviations: Tensor) -> None:
        super().__init__([site.name])
        self.name = site.name
        self.register_buffer("mu", mean.detach().clone())
        self.register_buffer("frame", frame)
        self.register_buffer("deviations", deviations)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the matrix, by noise that deviations multiply: at others, the same draw is as much longer."""
        law = dist.Normal(torch.zeros_like(self.mu), 1.0).to_event(3)
        noise = pyro.sample(f"{self.name}.noise", law, infer={"is_auxiliary": True})
        value = self.mu + (noise * self.deviations.unsqueeze(-2)) @ self.frame
        return {self.name: pyro.sample(self.name, dist.Delta(value, event_dim=3, validate_args=False))}

    def mean(self) -> dict[str, Tensor]:
        """The matrix without noise."""
        return {self.name: self.mu.clone()}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density of a value of the matrix, a scalar: turned into the frame, its entries are independent.

        Raises:
            PosteriorError: there is no value.
        """
        self._require(values)
        turned = (values[self.name] - self.mu) @ self.frame.mT
        return dist.Normal(0.0, self.deviations.unsqueeze(-2), validate_args=False).log_prob(turned).sum()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Nothing is learned."""
        return {}
