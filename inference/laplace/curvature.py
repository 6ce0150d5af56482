"""Curvature of the log-likelihood in the LoRA matrices: the generalised Gauss-Newton matrix F, in four forms.

Each form adds up the batches of one pass over the data, and then gives F in a basis where it is diagonal once the
prior's covariance is the identity (`Curvature.basis`). All that a Laplace posterior needs follows from there: see
`bayeslora.inference.laplace.gaussian`.

Here is what all forms share, and the one that is the default; they are

- ``kron``: for each matrix a Kronecker product of a factor of the columns and one of the rank.
- ``diag`` (`bayeslora.inference.laplace.forms`, with the two below): the diagonal of F, from whole examples.
- ``full``: F itself, for small adapters.
- ``exact``: the Jacobian J with F = J^T J, for few examples: what is solved is as large as examples times classes.

The factor of the columns is a sketch of rank k (Nyström's, in one pass: Tropp, Yurtsever, Udell and Cevher, *Fixed-rank
approximation of a positive-semidefinite matrix from streaming data*, NeurIPS 2017): nothing is as large as columns
times columns.

Tokens share the weights, and the factors have to say how. With w (x) u the gradient of one function of the logits at
one token (w on the side of the columns, u on that of the rank), G = sum w u^T over the tokens of an example, and sums
over the data and the vectors of the likelihood's curvature:

- ``sum``: (sum G G^T) (x) (sum G^T G) / sum |G|^2, from whole examples (Morwani, Shapira, Vyas, Malach, Kakade and
  Janson, *A new perspective on Shampoo's preconditioner*, ICLR 2025: a step of power iteration towards the nearest
  Kronecker product). Its trace is that of F.
- ``expand``: (sum w w^T) (x) (sum u u^T) / tokens, as if each token were an example of its own.
  From Eschenhagen, Immer, Turner, Schneider and Hennig, *Kronecker-factored approximate curvature for modern neural
  network architectures*, NeurIPS 2023; what Laplace-LoRA was published with.

Both are exact for one token if what comes back, up to its size, is the same for every example. On the embedded demo, at
rank 64, the variances of the logits are off by 8 and 41 % (`benchmarks/curvature.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bayeslora.errors import TrainingError
from bayeslora.inference.laplace.gaussian import Basis, BlockBasis, Roots
from bayeslora.inference.laplace.jacobians import Layer, Products, as_matrices
from bayeslora.sites import Site

__all__ = ["Curvature", "Kronecker", "check_finite", "nystrom"]


class Curvature(ABC):
    """F of the matrices of some sites.

    Args:
        sites: whose matrices.

    Attributes:
        shapes: (layers, columns, rank) of the matrices by site.
        layers: every matrix, in the order of `flat`.
        size: number of weights.
    """

    kind: ClassVar[str]

    def __init__(self, sites: Sequence[Site]) -> None:
        self.shapes = {site.name: tuple(as_matrices(site, site.initial).shape) for site in sites}
        self.layers = [(name, place) for name, shape in self.shapes.items() for place in range(shape[0])]
        self.size = sum(torch.Size(shape).numel() for shape in self.shapes.values())

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
        """Eigenvalues of F where the prior's covariance is the identity, one vector."""

    @abstractmethod
    def basis(self, roots: Roots) -> Basis:
        """Eigenvectors of F there."""

    def finish(self) -> None:
        """Called once, after the last batch.

        Raises:
            TrainingError: F is not finite.
        """
        check_finite(self.tensors())


class Kronecker(Curvature):
    """A Kronecker product for each matrix, its wide factor of low rank.

    Args:
        sites: whose matrices.
        rank: of the wide factor; exact where it reaches the number of columns.
        sharing: "sum" or "expand".
    """

    kind: ClassVar[str] = "kron"

    def __init__(self, sites: Sequence[Site], rank: int = 16, sharing: str = "sum") -> None:
        super().__init__(sites)
        self.rank, self.sharing = rank, sharing
        self._test: dict[int, Tensor] = {}
        self._sketch: dict[Layer, Tensor] = {}
        self._narrow: dict[Layer, Tensor] = {}
        self._divisor = {key: sites[0].initial.new_zeros((), dtype=torch.float64) for key in self.layers}
        generator = torch.Generator().manual_seed(0)
        for site in sites:
            layers, columns, narrow = self.shapes[site.name]
            if columns not in self._test:
                self._test[columns] = _test_matrix(columns, rank, generator).to(site.initial)
            for place in range(layers):
                self._sketch[site.name, place] = torch.zeros_like(self._test[columns])
                self._narrow[site.name, place] = site.initial.new_zeros(narrow, narrow)
        self._factors: dict[str, Tensor] = {}

    def add(self, products: Mapping[Layer, Products], vector: int) -> None:
        """Add the examples' gradients, or their tokens'."""
        for key, product in products.items():
            if self.sharing == "sum":
                self._add_examples(key, product)
            else:
                self._add_tokens(key, product, vector == 0)

    def _add_examples(self, key: Layer, product: Products) -> None:
        gradients = product.matrices()
        wide, narrow = gradients.mT.flatten(0, 1), gradients.flatten(0, 1)
        self._sketch[key] += wide.mT @ (wide @ self._test[product.columns])
        self._narrow[key] += narrow.mT @ narrow
        self._divisor[key] += gradients.square().sum()

    def _add_tokens(self, key: Layer, product: Products, first: bool) -> None:
        """What entered is the same for every vector of the curvature, and counts once."""
        if first or not product.wide_is_input:
            self._sketch[key] += product.summed(product.projected(self._test[product.columns]))
        if first or product.wide_is_input:
            rows = product.narrow.flatten(0, 1)
            self._narrow[key] += rows.mT @ rows
        if first:
            self._divisor[key] += product.counted.sum()

    def tensors(self) -> dict[str, Tensor]:
        """Eigenvectors (layers, columns, k) and eigenvalues (layers, k) of the wide factor, and the narrow one."""
        return self._factors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over finished factors."""
        self._factors = dict(tensors)
        self._sketch.clear()
        self._narrow.clear()

    def finish(self) -> None:
        """Turn the sketches into factors, which take less room.

        Raises:
            TrainingError: F is not finite.
        """
        for parts in (self._sketch, self._narrow):
            check_finite({f"{name} {place}": value for (name, place), value in parts.items()})
        found = {}
        for name, (layers, columns, _) in self.shapes.items():
            keys = [(name, place) for place in range(layers)]
            pairs = [nystrom(self._sketch[key], self._test[columns], self.rank) for key in keys]
            found[f"{name}.vectors"] = torch.stack([vectors for vectors, _ in pairs])
            divisors = torch.stack([self._divisor[key] for key in keys])
            values = torch.stack([values for _, values in pairs])
            # A layer without gradients has none to divide.
            found[f"{name}.values"] = values / torch.where(divisors > 0, divisors, 1.0).unsqueeze(-1)
            found[f"{name}.narrow"] = torch.stack([self._narrow[key] for key in keys])
        self.load(found)

    def gains(self, roots: Roots) -> Tensor:
        """All products of an eigenvalue of the wide factor and one of the narrow factor."""
        tensors, found = self._factors, []
        for name in self.shapes:
            narrow = torch.linalg.eigvalsh(_congruent(tensors[f"{name}.narrow"], roots[name]))
            found.append(_outer(tensors[f"{name}.values"].to(narrow), narrow).flatten())
        return torch.cat(found)

    def basis(self, roots: Roots) -> Basis:
        """Kronecker products of both factors' eigenvectors."""
        tensors = self._factors
        wide, narrow, gains = {}, {}, {}
        for name in self.shapes:
            values, narrow[name] = torch.linalg.eigh(_congruent(tensors[f"{name}.narrow"], roots[name]))
            wide[name] = tensors[f"{name}.vectors"].to(values)
            gains[name] = _outer(tensors[f"{name}.values"].to(values), values)
        return BlockBasis(wide, narrow, gains)


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


def nystrom(sketch: Tensor, test: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors (columns, rank) and eigenvalues (rank,) of a positive matrix H, given its sketch H ``test``.

    The best approximation of that rank to what the sketch tells of H; exact where the rank of H is no larger.
    """
    sketch, test = sketch.double(), test.double()
    values, vectors = torch.linalg.eigh((test.mT @ sketch + sketch.mT @ test) / 2)
    # What single precision cannot tell from zero would be divided by.
    floor = values[-1].clamp(min=torch.finfo(torch.float64).tiny) * len(values) * torch.finfo(torch.float32).eps
    scale = torch.where(values > floor, values, torch.inf).rsqrt()
    left, singular, _ = torch.linalg.svd(sketch @ (vectors * scale), full_matrices=False)
    return left[:, :rank], singular[:rank].square()


def _test_matrix(columns: int, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns, as many as the sketch has: twice the rank, or all."""
    width = 2 * rank + 1
    if width >= columns:
        return torch.eye(columns)
    return torch.linalg.qr(torch.randn(columns, width, generator=generator)).Q


def _congruent(matrix: Tensor, root: Tensor) -> Tensor:
    return root.mT @ matrix.to(root) @ root


def _outer(one: Tensor, two: Tensor) -> Tensor:
    return one.unsqueeze(-1) * two.clamp(min=0).unsqueeze(-2)
