"""The evidence for a prior, in two forms.

Laplace's evidence takes the weights for a mode of prior times likelihood. They are none if a user gives them, or once
the prior is tuned, and it then charges the prior with all of the weights' length. A thousand examples fix a thousand
directions at most of some hundred thousand weights; what an optimiser leaves in the others, where the data ask for
nothing, makes the tuned prior far too wide (Antoran, Janz, Allingham, Daxberger, Barbano, Nalisnick and
Hernandez-Lobato, *Adapting the linearised Laplace model evidence for modern deep learning*, ICML 2022).

`LinearEvidence` is that of the linear model around the weights, whose mode may be elsewhere; `ModeEvidence` the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bayeslora.inference.curvature import Batch, Curvature
from bayeslora.inference.jacobians import Layer, Products
from bayeslora.inference.priors import NormalPrior

__all__ = ["Evidence", "LinearEvidence", "ModeEvidence", "counted", "offsets"]

#: Rows times vectors of the likelihood's curvature that the evidence counts at most.
VECTORS = 2048
#: Numbers that stand for the gradient of a row: kernels of the rows of 72 matrices of rank 8 are off by some 2 %. All
#: rows together take 256 MiB at most.
FEATURES = 32768


class Evidence(Protocol):
    """Log p(data), in nats."""

    def __call__(self, prior: NormalPrior) -> Tensor:
        """Under a prior; a scalar that is differentiable by the prior's roots."""

    def along(self, prior: NormalPrior) -> Callable[[Tensor], Tensor]:
        """Under all multiples of a prior: a function of the log of a multiple (1,)."""


class LinearEvidence:
    """Log p(data) of the model that is linear in the weights, with the likelihood to second order.

    Row i of the data and each vector r of the likelihood's curvature there see the weights through a = J_i^T r, and
    want a^T theta = t = a^T mode + c, where the c of a row give back its score, sum_r c_r r. With A and t of all rows,

        log p(data | theta) = value + |c|^2 / 2 - |t - A theta|^2 / 2

    and the integral over theta is known. A row's |c|^2 / 2 is how much its likelihood would gain by Newton's step, and
    is cut to what it can gain at all: for labels that are thought impossible the step is far too long.

    In the kernel A A^T of the rows, A is replaced by A W, where W takes the columns of each matrix to a few random
    directions (Johnson and Lindenstrauss: inner products of A's rows stay, up to noise); t is exact. There is no noise
    where the directions are as many as the columns. Of many rows, `counted` ones stand for all: the prior does not
    depend on how many there are.

    Args:
        mode: matrices (layers, columns, rank) by site.
        prior: its centres; its roots do not matter.
        features: numbers that stand for a row's gradient, about so many.
    """

    def __init__(self, mode: Mapping[str, Tensor], prior: NormalPrior, features: int = FEATURES) -> None:
        wide = max(1, features // sum(value.shape[0] * value.shape[2] for value in mode.values()))
        generator = torch.Generator().manual_seed(0)
        self._shapes: dict[str, tuple[int, ...]] = {}
        #: What each matrix's columns meet: the random directions, and the distance of the mode from the centre.
        self._sides: dict[Layer, Tensor] = {}
        for name, value in mode.items():
            layers, columns, rank = value.shape
            self._shapes[name] = (layers, min(wide, columns), rank)
            for place in range(layers):
                random = _directions(columns, wide, generator).to(value)
                self._sides[name, place] = torch.cat([random, value[place] - prior.centres[name][place]], dim=1)
        self._features: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._constant = 0.0

    def watched(
        self, batch: Batch, offsets: Tensor, log_likelihoods: Tensor, counts: Tensor
    ) -> Iterator[Mapping[Layer, Products]]:
        """Pass on the gradients of a batch, and keep what the evidence needs of them.

        Args:
            batch: gradients for each vector of the likelihood's curvature.
            offsets: c (vectors, examples).
            log_likelihoods: at the mode (examples,).
            counts: whether an example is one of those that count (examples,).
        """
        self._constant += float(log_likelihoods[counts].sum())
        for products, offset in zip(batch, offsets, strict=True):
            self._add(products, offset, counts)
            yield products

    def _add(self, products: Mapping[Layer, Products], offset: Tensor, counts: Tensor) -> None:
        seen, target = [], offset.clone()
        for key, side in self._sides.items():
            product, wide = products[key], self._shapes[key[0]][1]
            sides = product.projected(side)
            seen.append((sides[..., :wide].mT @ product.narrow).flatten(1))
            target += (sides[..., wide:] * product.narrow).sum((1, 2))
        self._features.append(torch.cat(seen, dim=1)[counts])
        self._targets.append(target[counts])
        self._constant += float(offset[counts].square().sum()) / 2

    def __call__(self, prior: NormalPrior) -> Tensor:
        """Log p(data) under a prior with the same centres."""
        kernel = self._kernel(prior)
        root = torch.linalg.cholesky(kernel + torch.eye(len(kernel)).to(kernel))
        rest = torch.linalg.solve_triangular(root, torch.cat(self._targets).unsqueeze(1), upper=False)
        return self._constant - rest.square().sum() / 2 - root.diagonal().log().sum()

    def along(self, prior: NormalPrior) -> Callable[[Tensor], Tensor]:
        """The same under all multiples of a prior."""
        values, vectors = torch.linalg.eigh(self._kernel(prior))
        squares = (vectors.mT @ torch.cat(self._targets)).square()

        def evidence(log: Tensor) -> Tensor:
            gains = values.clamp(min=0) * (2 * log).exp()
            return self._constant - (squares / (1 + gains) + gains.log1p()).sum() / 2

        return evidence

    def _kernel(self, prior: NormalPrior) -> Tensor:
        """Inner products of the rows' gradients where the prior's covariance is the identity."""
        sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
        self._features = [torch.cat(self._features)]
        parts = self._features[0].split(sizes, dim=1)
        total: Tensor | float = 0.0
        for part, (name, shape) in zip(parts, self._shapes.items(), strict=True):
            root = prior.roots[name]
            rows = (part.to(root).unflatten(-1, shape) @ root).flatten(1)
            total = total + rows @ rows.mT
        assert isinstance(total, Tensor)  # there are sites
        return total


def counted(rows: int, vectors: int) -> Tensor:
    """Which rows of the data the evidence counts (rows,): all, or so many at random that it can be computed."""
    found = torch.zeros(rows, dtype=torch.bool)
    found[torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: max(1, VECTORS // vectors)]] = True
    return found


def _directions(columns: int, wide: int, generator: torch.Generator) -> Tensor:
    if wide >= columns:
        return torch.eye(columns)
    return torch.randn(columns, wide, generator=generator) / math.sqrt(wide)


def offsets(roots: Tensor, score: Tensor, gain: Tensor) -> Tensor:
    """The c (vectors, examples) of `LinearEvidence`: coordinates of scores in the vectors of the curvature.

    Args:
        roots: (vectors, examples, outputs).
        score: (examples, outputs).
        gain: how much each example's log-likelihood can rise at most (examples,).
    """
    found = (torch.linalg.pinv(roots.permute(1, 2, 0)) @ score.unsqueeze(-1)).squeeze(-1)
    length = found.norm(dim=-1).clamp(min=torch.finfo(found.dtype).tiny)
    return (found * ((2 * gain).sqrt() / length).clamp(max=1).unsqueeze(-1)).mT


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
