"""A Gaussian over LoRA matrices, whose precision is the prior's plus a curvature.

In coordinates phi in which the prior is N(0, I), the precision is I + F, and F is diagonal in an orthonormal basis b_j
with gains g_j (zero for what the basis lacks). Then

    log det (I + F) = sum_j log(1 + g_j)
    phi^T (I + F) phi = |phi|^2 + sum_j g_j c_j^2, with c_j = b_j^T phi
    phi = e - sum_j (1 - (1 + g_j)^{-1/2}) (b_j^T e) b_j has the covariance (I + F)^{-1}, if e ~ N(0, I)
    x^T (I + F)^{-1} y = x^T y - sum_j g_j / (1 + g_j) (b_j^T x) (b_j^T y)

so that no matrix is ever inverted, and nothing is as large as weights times weights unless the basis is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayeslora.inference.laplace.jacobians import Layer

__all__ = ["Basis", "BlockBasis", "Roots", "SharedBasis", "covariances", "draw", "log_det", "quadratic"]

#: Root R (layers, rank, rank) of the prior covariance R R^T of a column, by site; double precision.
Roots = Mapping[str, Tensor]


class Basis(ABC):
    """Orthonormal vectors in the space of all matrices, and the gain of each."""

    @abstractmethod
    def project(self, key: Layer, matrices: Tensor) -> Tensor:
        """b_j^T x for the part of x in one layer, (..., columns, rank): (..., vectors)."""

    @abstractmethod
    def expand(self, key: Layer, coordinates: Tensor) -> Tensor:
        """The part in one layer of sum_j c_j b_j: (..., columns, rank)."""

    @abstractmethod
    def gains(self, key: Layer) -> Tensor:
        """g_j of the vectors that `project` gives coordinates of."""

    #: Whether the vectors of a layer are zero in all others.
    local: bool


@dataclass(frozen=True)
class BlockBasis(Basis):
    """Vectors of each layer by itself: an outer product of a column's direction and one of the rank.

    Attributes:
        wide: directions (layers, columns, k), by site; None for unit vectors.
        narrow: directions (layers, rank, rank), or for each column (layers, columns, rank, rank).
        values: gains (layers, k or columns, rank).
    """

    wide: Mapping[str, Tensor | None]
    narrow: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    local = True

    def project(self, key: Layer, matrices: Tensor) -> Tensor:
        """Coordinates, one for each pair of directions."""
        name, place = key
        wide, narrow = self.wide[name], self.narrow[name][place].to(matrices)
        if wide is None:
            return torch.einsum("...cr,crs->...cs", matrices, narrow).flatten(-2)
        return (wide[place].to(matrices).mT @ matrices @ narrow).flatten(-2)

    def expand(self, key: Layer, coordinates: Tensor) -> Tensor:
        """The combination of pairs of directions."""
        name, place = key
        wide, narrow = self.wide[name], self.narrow[name][place].to(coordinates)
        pairs = coordinates.unflatten(-1, self.values[name].shape[1:])
        if wide is None:
            return (pairs.unsqueeze(-2) @ narrow.mT).squeeze(-2)
        return wide[place].to(pairs) @ pairs @ narrow.mT

    def gains(self, key: Layer) -> Tensor:
        """g_j of the layer's vectors."""
        return self.values[key[0]][key[1]].flatten()


class SharedBasis(Basis):
    """Vectors that reach over all layers.

    Args:
        vectors: (weights, vectors), weights in the order of ``shapes``.
        gains: (vectors,).
        shapes: (layers, columns, rank) of the matrices by site.
    """

    local = False

    def __init__(self, vectors: Tensor, gains: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._gains = gains
        layers = [((name, place), shape[1:]) for name, shape in shapes.items() for place in range(shape[0])]
        parts = vectors.split([torch.Size(shape).numel() for _, shape in layers])
        self._parts = {key: (part, shape) for (key, shape), part in zip(layers, parts, strict=True)}

    def project(self, key: Layer, matrices: Tensor) -> Tensor:
        """What one layer adds to the coordinates."""
        part, _ = self._parts[key]
        return matrices.flatten(-2) @ part.to(matrices)

    def expand(self, key: Layer, coordinates: Tensor) -> Tensor:
        """The combination's part in one layer."""
        part, shape = self._parts[key]
        return (coordinates @ part.to(coordinates).mT).unflatten(-1, shape)

    def gains(self, key: Layer) -> Tensor:
        """g_j of all vectors."""
        return self._gains


def log_det(basis: Basis, layers: Sequence[Layer]) -> Tensor:
    """Log det (I + F), a scalar."""
    keys = layers if basis.local else layers[:1]
    return torch.stack([basis.gains(key).log1p().sum() for key in keys]).sum()


def quadratic(basis: Basis, matrices: Mapping[Layer, Tensor]) -> Tensor:
    """phi^T (I + F) phi, a scalar."""
    total = torch.stack([value.double().square().sum() for value in matrices.values()]).sum()
    for _, gains, coordinates in _grouped(basis, matrices):
        total = total + (gains * coordinates.double().square()).sum()
    return total


def draw(basis: Basis, noise: Mapping[Layer, Tensor]) -> dict[Layer, Tensor]:
    """Phi with the covariance (I + F)^{-1}, given standard normal matrices by layer."""
    found = dict(noise)
    for keys, gains, coordinates in _grouped(basis, noise):
        change = (1 - (1 + gains).rsqrt()).to(coordinates) * coordinates
        for key in keys:
            found[key] = found[key] - basis.expand(key, change)
    return found


def covariances(basis: Basis, jacobian: Mapping[Layer, Tensor], roots: Roots, multiples: Tensor) -> Tensor:
    """J (I + F)^{-1} J^T of each example, layer by layer, for several scales of the prior.

    With a prior m times as wide, gradients are m times and gains m^2 times as large, and the basis is the same.

    Args:
        basis: of F.
        jacobian: gradients (examples, outputs, columns, rank) by layer.
        roots: of the prior covariance, which take gradients to the coordinates phi.
        multiples: of the prior's standard deviations (multiples,).

    Returns:
        Covariances of the outputs (multiples, examples, outputs, outputs).
    """
    squares = multiples.double().square().tolist()
    total: Tensor | float = 0.0
    shared: Tensor | float = 0.0
    shrunk: list[Tensor | float] = [0.0] * len(squares)
    for key, matrices in jacobian.items():
        root = roots[key[0]][key[1]]
        # In double precision: a posterior far narrower than the prior is a small difference of large numbers.
        gradients = matrices.double() @ root
        rows = gradients.flatten(-2)
        total = total + rows @ rows.mT
        coordinates = basis.project(key, gradients)
        if basis.local:
            shrunk = [
                each + _shrunk(coordinates, square * basis.gains(key))
                for each, square in zip(shrunk, squares, strict=True)
            ]
        else:
            shared = shared + coordinates
    if isinstance(shared, Tensor):
        shrunk = [_shrunk(shared, square * basis.gains(key)) for square in squares]
    return torch.stack([square * (total - each) for square, each in zip(squares, shrunk, strict=True)])


def _shrunk(coordinates: Tensor, gains: Tensor) -> Tensor:
    return (coordinates * (gains / (1 + gains)).to(coordinates)) @ coordinates.mT


def _grouped(basis: Basis, matrices: Mapping[Layer, Tensor]) -> list[tuple[list[Layer], Tensor, Tensor]]:
    """Layers that share vectors, the vectors' gains and the coordinates."""
    parts = [([key], basis.gains(key), basis.project(key, value)) for key, value in matrices.items()]
    if basis.local:
        return parts
    together = torch.stack([coordinates for _, _, coordinates in parts]).sum(0)
    return [(list(matrices), parts[0][1], together)]
