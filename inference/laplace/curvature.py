"""Curvature of the log-likelihood in the LoRA matrices: the generalised Gauss-Newton matrix F, in four forms.

Each form adds up the batches of one pass over the data, and then gives F in a basis where it is diagonal once the
prior's covariance is the identity (`Curvature.basis`). All that a Laplace posterior needs follows from there: see
`bayeslora.inference.laplace.gaussian`.

Here is what all forms share; they are

- ``diag`` (`bayeslora.inference.laplace.forms`, with the two below): the diagonal of F, from whole examples.
- ``full``: F itself, for small adapters.
- ``exact``: the Jacobian J with F = J^T J, for few examples: what is solved is as large as examples times classes.
- ``kron`` (`bayeslora.inference.laplace.kronecker`): a Kronecker product for each matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bayeslora.errors import TrainingError
from bayeslora.inference.laplace.gaussian import Basis, Roots
from bayeslora.inference.laplace.jacobians import Layer, Products, as_matrices
from bayeslora.weights import Site

__all__ = ["Curvature", "check_finite"]


class Curvature(ABC):
    """F of the matrices of some sites.

    Args:
        sites: whose matrices.
    """

    kind: ClassVar[str]

    def __init__(self, sites: Sequence[Site]) -> None:
        self.shapes = {site.name: tuple(as_matrices(site, site.initial).shape) for site in sites}

    @property
    def layers(self) -> list[Layer]:
        """Every matrix, in the order of `flat`."""
        return [(name, place) for name, shape in self.shapes.items() for place in range(shape[0])]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def room(self, vectors: int) -> int:
        """Bytes that it takes for so many gradients: rows of the data times vectors of the likelihood's curvature."""
        return 4 * self.size

    @abstractmethod
    def add(self, products: Mapping[Layer, Products], vector: int) -> None:
        """Add the gradients of a batch for one vector, given its number, of the likelihood's curvature."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All of it, by names that `load` knows again."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave."""

    @abstractmethod
    def gains(self, roots: Roots) -> Tensor:
        """Eigenvalues of F where the prior's covariance is the identity, one vector; differentiable by the roots."""

    @abstractmethod
    def basis(self, roots: Roots) -> Basis:
        """Eigenvectors of F there."""

    def finish(self) -> None:
        """Called once, after the last batch.

        Raises:
            TrainingError: F is not finite.
        """
        check_finite(self.tensors())


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Make sure that the factors are.

    Raises:
        TrainingError: they are not (the message names the first).
    """
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise TrainingError(
                f"The curvature is not finite at '{name}': the network's outputs overflow at these weights. Train with "
                "a smaller learning rate, or in float32."
            )
