"""The forms of curvature by name, and those that are no Kronecker product: diagonal, whole, and by its square root."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bayeslora.inference.laplace.curvature import Curvature, Kronecker
from bayeslora.inference.laplace.gaussian import Basis, BlockBasis, Roots, SharedBasis
from bayeslora.inference.laplace.jacobians import Layer, Products, as_matrices
from bayeslora.sites import Site

__all__ = ["CURVATURES", "Diagonal", "Dual", "Full", "make_curvature"]


class Diagonal(Curvature):
    """The diagonal of F."""

    kind: ClassVar[str] = "diag"

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites)
        self._squares = {site.name: torch.zeros_like(as_matrices(site, site.initial)) for site in sites}

    def room(self, vectors: int) -> int:
        """The diagonal, and in double precision a block of the rank for each column, with its eigenvectors."""
        return 4 * self.size + 32 * sum(layers * columns * rank**2 for layers, columns, rank in self.shapes.values())

    def add(self, products: Mapping[Layer, Products], vector: int) -> None:
        """Add the squares of each example's gradient."""
        for (name, place), product in products.items():
            self._squares[name][place] += product.matrices().square().sum(0)

    def tensors(self) -> dict[str, Tensor]:
        """The diagonal, by site, in the shape of its matrices."""
        return dict(self._squares)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a diagonal."""
        self._squares = dict(tensors)

    def gains(self, roots: Roots) -> Tensor:
        """A block of the rank for each column: the prior may correlate the entries of a column."""
        return torch.cat([torch.linalg.eigvalsh(self._blocks(name, roots)).flatten() for name in self.shapes])

    def basis(self, roots: Roots) -> Basis:
        """The eigenvectors of each column's block."""
        found = {name: torch.linalg.eigh(self._blocks(name, roots)) for name in self.shapes}
        return BlockBasis(
            {name: None for name in found},
            {name: vectors for name, (_, vectors) in found.items()},
            {name: values for name, (values, _) in found.items()},
        )

    def _blocks(self, name: str, roots: Roots) -> Tensor:
        root = roots[name].unsqueeze(1)
        return root.mT @ (self._squares[name].to(root).unsqueeze(-1) * root)


class Full(Curvature):
    """F as one matrix."""

    kind: ClassVar[str] = "full"

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites)
        self._matrix: Tensor | None = None

    def room(self, vectors: int) -> int:
        """In double precision the matrix and, while its eigenvectors are found, some seven more."""
        return 64 * self.size**2

    def add(self, products: Mapping[Layer, Products], vector: int) -> None:
        """Add the squares of each example's gradient."""
        # In double precision: directions without data must not gain from the rounding of others.
        rows = flat(self.layers, products).double()
        self._matrix = rows.mT @ rows if self._matrix is None else self._matrix.addmm_(rows.mT, rows)

    def tensors(self) -> dict[str, Tensor]:
        """The matrix, weights in the order of `flat`."""
        assert self._matrix is not None  # there are rows
        return {"matrix": self._matrix}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a matrix."""
        self._matrix = tensors["matrix"]

    def gains(self, roots: Roots) -> Tensor:
        """Eigenvalues of the matrix between the prior's roots."""
        return torch.linalg.eigvalsh(self._whitened(roots))

    def basis(self, roots: Roots) -> Basis:
        """Its eigenvectors."""
        gains, vectors = torch.linalg.eigh(self._whitened(roots))
        return SharedBasis(vectors, gains.clamp(min=0), self.shapes)

    def _whitened(self, roots: Roots) -> Tensor:
        half = whitened_rows(self.tensors()["matrix"], roots, self.shapes)
        return whitened_rows(half.mT, roots, self.shapes)


class Dual(Curvature):
    """F by its square root, the Jacobian of all examples."""

    kind: ClassVar[str] = "exact"

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites)
        self._rows: list[Tensor] = []

    def room(self, vectors: int) -> int:
        """The Jacobian in single precision and, while the prior is tuned, in double; products of its rows."""
        return 40 * vectors * self.size + 48 * vectors**2

    def add(self, products: Mapping[Layer, Products], vector: int) -> None:
        """Keep each example's gradient."""
        self._rows.append(flat(self.layers, products))

    def tensors(self) -> dict[str, Tensor]:
        """The Jacobian (examples times vectors, weights)."""
        self._rows = [torch.cat(self._rows)]
        return {"jacobian": self._rows[0]}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a Jacobian."""
        self._rows = [tensors["jacobian"]]

    def gains(self, roots: Roots) -> Tensor:
        """Eigenvalues of J J^T; the others are zero."""
        rows = self._whitened(roots)
        return torch.linalg.eigvalsh(rows @ rows.mT).clamp(min=0)

    def basis(self, roots: Roots) -> Basis:
        """J^T v / sqrt(gain) for each eigenvector v of J J^T; directions without data are left out."""
        rows = self._whitened(roots)
        gains, vectors = torch.linalg.eigh(rows @ rows.mT)
        kept = gains > gains[-1] * len(gains) * torch.finfo(gains.dtype).eps
        return SharedBasis(rows.mT @ vectors[:, kept] / gains[kept].sqrt(), gains[kept], self.shapes)

    def _whitened(self, roots: Roots) -> Tensor:
        return whitened_rows(self.tensors()["jacobian"], roots, self.shapes)


CURVATURES: dict[str, type[Curvature]] = {each.kind: each for each in (Diagonal, Kronecker, Full, Dual)}


def make_curvature(kind: str, sites: Sequence[Site], rank: int, sharing: str) -> Curvature:
    """Curvature of a kind, zero so far; ``rank`` and ``sharing`` are of "kron"."""
    return Kronecker(sites, rank, sharing) if kind == "kron" else CURVATURES[kind](sites)


def flat(layers: Sequence[Layer], products: Mapping[Layer, Products]) -> Tensor:
    """Gradients of all layers as rows (examples, weights)."""
    return torch.cat([products[key].matrices().flatten(-2) for key in layers], dim=-1)


def whitened_rows(rows: Tensor, roots: Roots, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Rows of gradients (n, weights) where the prior's covariance is the identity."""
    parts = rows.to(next(iter(roots.values()))).split([torch.Size(shape).numel() for shape in shapes.values()], dim=-1)
    return torch.cat(
        [
            (part.unflatten(-1, shape) @ roots[name]).flatten(-3)
            for part, (name, shape) in zip(parts, shapes.items(), strict=True)
        ],
        dim=-1,
    )
