"""The evidence for a prior, in two forms.

Laplace's evidence takes the weights for a mode of prior times likelihood. They are none if a user gives them, or once
the prior is tuned, and it then charges the prior with all of the weights' length. A thousand examples fix a thousand
directions at most of some hundred thousand weights; what an optimiser leaves in the others, where the data ask for
nothing, makes the tuned prior far too wide (Antoran, Janz, Allingham, Daxberger, Barbano, Nalisnick and
Hernandez-Lobato, *Adapting the linearised Laplace model evidence for modern deep learning*, ICML 2022).

`LinearEvidence` is that of the linear model around the weights, whose mode may be elsewhere; `ModeEvidence` the other.
For the width of the prior there is a third: see `bayeslora.inference.laplace.refitted`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bayeslora.errors import TrainingError
from bayeslora.inference.laplace.curvature import Curvature
from bayeslora.inference.laplace.jacobians import Layer, Products
from bayeslora.inference.laplace.priors import NormalPrior

__all__ = ["Evidence", "LinearEvidence", "ModeEvidence"]

#: Random directions for the columns of all matrices together, a multiple of `VECTORS`: between so many rows the noise
#: of their kernel moves eigenvalues that are all alike by factors of up to (1 +- sqrt(VECTORS / DIRECTIONS))^2.
DIRECTIONS = 4096
#: Rows times vectors of the likelihood's curvature that count at most, and the room for what is kept of them, in bytes.
VECTORS, ROOM = 1024, 2**28
#: A matrix with so many columns that its directions would have more numbers than the latter has fewer, down to LEAST.
LEAST, WIDEST = 64, 2**22


class Evidence(Protocol):
    """Log p(data), in nats."""

    def __call__(self, prior: NormalPrior) -> Tensor:
        """Under a prior, a scalar."""

    def along(self, prior: NormalPrior) -> Callable[[Tensor], Tensor]:
        """Under all multiples of a prior, cheaply: a function of the log of a multiple (1,)."""


class LinearEvidence:
    """Log p(data) of the model that is linear in the weights, with the likelihood to second order.

    Row i of the data and each vector r of the likelihood's curvature there see the weights through a = J_i^T r, and
    want a^T theta = t = a^T mode + c, where the c of a row give back its score, sum_r c_r r (`offsets`). With A and t
    of all rows, and theta, like the mode, as a distance from the prior's centre,

        log p(data | theta) = value + |c|^2 / 2 - |t - A theta|^2 / 2

    and the integral over theta is known. A row's |c|^2 / 2 is how much its likelihood would gain by Newton's step, and
    is cut to what it can gain at all: for labels that are thought impossible the step is far too long.

    In the kernel A A^T of the rows, A is replaced by A W, where W takes the columns of each matrix to random directions
    (Johnson and Lindenstrauss: inner products of A's rows stay, up to noise); t is exact. There is no noise where the
    directions are as many as the columns; elsewhere the log evidence may be off by some nats. Where rows times vectors
    are more than `VECTORS`, the vectors of a row are added up with random signs, which keeps their squares on average;
    of rows that are still too many those that `counted` draws stand for all. The evidence is then that of a part of
    the data; how wide the prior is does not depend on how many rows there are, but for chance.

    Args:
        mode: matrices (layers, columns, rank) by site.
        prior: its centres; its roots do not matter.
        rows: of the data.
        vectors: of the likelihood's curvature for each row.
    """

    def __init__(self, mode: Mapping[str, Tensor], prior: NormalPrior, rows: int, vectors: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._shapes: dict[str, tuple[int, ...]] = {}
        #: What each matrix's columns meet: the random directions, and the distance of the mode from the centre.
        self._sides: dict[Layer, Tensor] = {}
        for (name, place), random in random_directions(mode, generator).items():
            self._shapes[name] = (len(mode[name]), random.shape[1], mode[name].shape[2])
            distance = mode[name][place] - prior.centres[name][place]
            self._sides[name, place] = torch.cat([random, distance], dim=1)
        size = sum(torch.Size(shape).numel() for shape in self._shapes.values())
        most = max(1, min(VECTORS, ROOM // (4 * size)))
        #: Signs (vectors, rows) with which the vectors of a row are added up, if there is no room for all.
        self._signs: Tensor | None = None
        if vectors > 1 and rows * vectors > most:
            self._signs = torch.randint(2, (vectors, rows), generator=generator).mul(2.0).sub(1.0)
        self.counted = counted(rows, most if self._signs is not None else most // vectors)
        #: How many rows of the data count.
        self.rows = int(self.counted.sum())
        self._together: list[Tensor] = []
        self._features: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._constant = 0.0

    def count(self, index: Tensor, log_likelihoods: Tensor) -> None:
        """Add the log-likelihoods (examples,) at the mode of the rows ``index`` (examples,), as far as they count."""
        self._constant += float(log_likelihoods[self.counted[index].to(log_likelihoods.device)].sum())

    def add(self, products: Mapping[Layer, Products], vector: int, index: Tensor, shift: Tensor) -> None:
        """Keep what the evidence needs of a batch's gradients for one vector of the likelihood's curvature.

        Args:
            products: the gradients.
            vector: its number; a batch's vectors come one after another.
            index: which rows of the data they are (examples,).
            shift: c (examples,) of the vector.
        """
        counts = self.counted[index].to(shift.device)
        found = [*self._seen(products, counts), shift[counts]]
        if self._signs is None:
            self._keep(*found)
            return
        signs = self._signs[vector, index].to(shift)[counts]
        signed = [found[0] * signs.unsqueeze(1).to(found[0]), found[1] * signs, found[2] * signs]
        self._together = [a + b for a, b in zip(self._together, signed, strict=True)] if vector else signed
        if vector + 1 == len(self._signs):
            self._keep(*self._together)

    def _seen(self, products: Mapping[Layer, Products], counts: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the rows that count, in the random directions, and times the mode's distance."""
        seen, met = [], torch.zeros(int(counts.sum()), dtype=torch.float64, device=counts.device)
        for key, side in self._sides.items():
            product, wide = products[key].of(counts), self._shapes[key[0]][1]
            sides = product.projected(side)
            seen.append((sides[..., :wide].mT @ product.narrow).flatten(1))
            met += (sides[..., wide:] * product.narrow).sum((1, 2))
        return torch.cat(seen, dim=1), met

    def _keep(self, seen: Tensor, met: Tensor, shift: Tensor) -> None:
        self._features.append(seen)
        self._targets.append(met + shift)
        self._constant += float(shift.square().sum()) / 2

    def __call__(self, prior: NormalPrior) -> Tensor:
        """Log p(data) under a prior with the same centres.

        Raises:
            TrainingError: the prior is so wide that rounding hides the likelihood.
        """
        kernel = self._kernel(prior)
        try:
            root = torch.linalg.cholesky(kernel + torch.eye(len(kernel)).to(kernel))
        except torch.linalg.LinAlgError as error:
            raise TrainingError(
                "The evidence cannot be computed under a prior that is so wide: start from a narrower one "
                "(deviation=0.1 of the model of the weights, or a smaller scale)."
            ) from error
        rest = torch.linalg.solve_triangular(root, torch.cat(self._targets).unsqueeze(1), upper=False)
        return self._constant - rest.square().sum() / 2 - root.diagonal().log().sum()

    def along(self, prior: NormalPrior) -> Callable[[Tensor], Tensor]:
        """The same under all multiples of a prior, given the log of one (1,)."""
        values, vectors = torch.linalg.eigh(self._kernel(prior))
        squares = (vectors.mT @ torch.cat(self._targets)).square()

        def evidence(log: Tensor) -> Tensor:
            gains = values.clamp(min=0) * (2 * log).exp()
            return self._constant - (squares / (1 + gains) + gains.log1p()).sum() / 2

        return evidence

    def _kernel(self, prior: NormalPrior) -> Tensor:
        """Inner products (rows, rows) of the rows' gradients where the prior's covariance is the identity."""
        self._features = [torch.cat(self._features)]
        sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
        found = []
        for part, (name, shape) in zip(self._features[0].split(sizes, dim=1), self._shapes.items(), strict=True):
            root = prior.roots[name]
            rows = (part.to(root).unflatten(-1, shape) @ root).flatten(1)
            found.append(rows @ rows.mT)
        return torch.stack(found).sum(0)


def counted(rows: int, most: int) -> Tensor:
    """Which rows of the data count (rows,): all, or as many as may, at random, but one at least."""
    found = torch.zeros(rows, dtype=torch.bool)
    found[torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: max(1, most)]] = True
    return found


def random_directions(mode: Mapping[str, Tensor], generator: torch.Generator) -> dict[Layer, Tensor]:
    """Directions (columns, k) of each matrix in which its columns are seen."""
    share = max(1, DIRECTIONS // sum(len(value) for value in mode.values()))
    found = {}
    for name, value in mode.items():
        columns = value.shape[1]
        for place in range(len(value)):
            wide = min(share, max(LEAST, WIDEST // columns))
            found[name, place] = _columns_seen(columns, wide, generator).to(value)
    return found


def _columns_seen(columns: int, wide: int, generator: torch.Generator) -> Tensor:
    if wide >= columns:
        return torch.eye(columns)
    return torch.randn(columns, wide, generator=generator) / math.sqrt(wide)


@dataclass(frozen=True)
class ModeEvidence:
    """Laplace's log p(data) = log p(data | mode) - |phi|^2 / 2 - log det (I + F) / 2, in nats, as published.

    The determinants of prior and posterior leave just that of I + F in the coordinates phi of a standard normal prior.

    Attributes:
        log_likelihood: of the data at the mode.
        mode: matrices (layers, columns, rank) by site.
        curvature: of the log-likelihood there.
    """

    log_likelihood: float
    mode: Mapping[str, Tensor]
    curvature: Curvature

    def __call__(self, prior: NormalPrior) -> Tensor:
        """Log p(data) under a prior."""
        return self.along(prior)(torch.zeros(1, dtype=torch.float64))

    def along(self, prior: NormalPrior) -> Callable[[Tensor], Tensor]:
        """The same under all multiples of a prior."""
        distance = torch.stack([value.square().sum() for value in prior.whitened(self.mode).values()]).sum()
        gains = self.curvature.gains(prior.roots).clamp(min=0)

        def evidence(log: Tensor) -> Tensor:
            square = (2 * log).exp().to(gains)
            return self.log_likelihood - (distance / square).sum() / 2 - (square * gains).log1p().sum() / 2

        return evidence
