"""The evidence of the linear network at its own mode, which does not take a network that interpolates at its word."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayeslora.inference.laplace.evidence import counted, random_directions
from bayeslora.inference.laplace.jacobians import jacobians
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.sites import Site

__all__ = ["Refitted", "RefittedEvidence"]

#: Rows times outputs that count at most.
OUTPUTS = 1024
#: Newton's steps, halvings of one, and the gain, relative to the objective, with which the last one ends.
STEPS, HALVINGS, GAIN = 100, 30, 1e-9


class Refitted(NamedTuple):
    """The linear network under one prior: its log evidence, and log p(data | weights) at its own mode, in nats."""

    evidence: float
    log_likelihood: float


class RefittedEvidence:
    """Laplace's log p(data) of the network that is linear in the weights, at that network's mode under each prior.

    `LinearEvidence` takes the log-likelihood for a parabola around the weights. Where labels are all but certain that
    parabola is flat: it lets the weights go back to the prior's centre for nothing, where the network knows nothing, so
    that the best prior has no width. Here the likelihood is kept as it is, and the mode found again under each prior,
    by Newton's method in the space of outputs: with K the outputs' prior covariance, f = m + K a their values and W
    minus the Hessian of the log-likelihood,

        log p(data) = log p(data | f) - a^T K a / 2 - log det (I + W^(1/2) K W^(1/2)) / 2

    as in Rasmussen and Williams, *Gaussian processes for machine learning*, MIT Press 2006, algorithms 3.1 and 3.3; for
    normal labels it is `LinearEvidence`. That the evidence of a linearised network is of the linear network's own mode
    is from Antoran et al., ICML 2022. Columns are seen in the same random directions as there, and of many rows some
    count.

    Args:
        program: whose network is linearised.
        sites: that are random.
        weights: all weights, around which it is linear, by site.
        mode: those of the sites as matrices (layers, columns, rank) by site.
        prior: of the sites.
        rows: with labels.
        temperature: that log-likelihoods are divided by.

    Attributes:
        at_mode: log-likelihood of the rows that count at the weights themselves, where the linear network is the
            network.
    """

    def __init__(
        self,
        program: Program,
        sites: list[Site],
        weights: Mapping[str, Tensor],
        mode: Mapping[str, Tensor],
        prior: NormalPrior,
        rows: Rows,
        temperature: float = 1.0,
    ) -> None:
        some = counted(len(rows), OUTPUTS // rows.observation.outputs)
        chosen = Rows.of(
            program, rows.dataset.select(some.nonzero().flatten().tolist()), rows.batch_size, rows.progress
        )
        labels = chosen.labels
        assert labels is not None  # `labelled` sees to it
        self._observation: Any = chosen.observation
        self._temperature = temperature
        sides = random_directions(mode, torch.Generator().manual_seed(0))
        order, seen, means, plain = [], [], [], []
        for index, outputs, gradients in jacobians(program, sites, weights, chosen):
            parts, mean = [], outputs.double()
            for (name, place), each in gradients.items():
                distance = mode[name][place] - prior.centres[name][place]
                mean = mean - (each * distance).double().sum((-2, -1))
                parts.append((sides[name, place].mT @ each).to(prior.roots[name]) @ prior.roots[name][place])
            order.append(index)
            plain.append(outputs)
            means.append(mean)
            seen.append(torch.cat([part.flatten(2) for part in parts], dim=-1).float())
        places = torch.cat(order).argsort()
        self._labels = labels.to(program.device)
        #: Outputs (examples, outputs) at the prior's centre, and their covariance.
        self._mean = torch.cat(means)[places]
        self.at_mode = self._log_likelihood(torch.cat(plain)[places])
        features = torch.cat(seen)[places].flatten(0, 1).double()
        self._kernel = features @ features.mT

    def __call__(self, multiple: float) -> Refitted:
        """The linear network under a prior that is so many times as wide."""
        kernel = multiple**2 * self._kernel
        a = torch.zeros_like(self._mean)
        height = self._height(kernel, a)
        for _ in range(STEPS):
            better = self._improved(kernel, a, height)
            if better is None:
                break
            gain = better[1] - height
            a, height = better
            if gain <= GAIN * (1 + abs(height)):
                break
        _, factor = self._curved(kernel, a)
        likelihood = self._log_likelihood(self._outputs(kernel, a))
        return Refitted(height - float(factor.diagonal().log().sum()), likelihood)

    def _improved(self, kernel: Tensor, a: Tensor, height: float) -> tuple[Tensor, float] | None:
        """Newton's step, halved until it leads no lower, and the height there; None where no half of it does."""
        step = self._newton(kernel, a) - a
        for halving in range(HALVINGS):
            tried = a + step / 2**halving
            found = self._height(kernel, tried)
            if found >= height:
                return tried, found
        return None

    def _log_likelihood(self, outputs: Tensor) -> float:
        return float(self._observation.log_prob(outputs, self._labels).double().sum() / self._temperature)

    def _outputs(self, kernel: Tensor, a: Tensor) -> Tensor:
        return self._mean + (kernel @ a.flatten()).view_as(a)

    def _height(self, kernel: Tensor, a: Tensor) -> float:
        """Log p(data | f) - a^T K a / 2."""
        return self._log_likelihood(self._outputs(kernel, a)) - float(a.flatten() @ (kernel @ a.flatten()) / 2)

    def _curved(self, kernel: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Roots R (examples, vectors, outputs) with W = R^T R, and the Cholesky factor of I + R K R^T."""
        outputs = self._outputs(kernel, a)
        roots = self._observation.curvature_root(outputs).transpose(0, 1) / math.sqrt(self._temperature)
        pairs = kernel.view(*a.shape, *a.shape)
        half = torch.einsum("nvc,ncmd->nvmd", roots, pairs)
        inner = torch.einsum("nvmd,mwd->nvmw", half, roots).flatten(2).flatten(0, 1)
        return roots, torch.linalg.cholesky(inner + torch.eye(len(inner)).to(inner))

    def _newton(self, kernel: Tensor, a: Tensor) -> Tensor:
        """The next a."""
        roots, factor = self._curved(kernel, a)
        outputs = self._outputs(kernel, a)
        shift = (kernel @ a.flatten()).view_as(a)
        score = self._observation.score(outputs, self._labels) / self._temperature
        wanted = torch.einsum("nvc,nvd,nd->nc", roots, roots, shift) + score
        met = torch.einsum("nvc,nc->nv", roots, (kernel @ wanted.flatten()).view_as(a)).flatten()
        solved = torch.cholesky_solve(met.unsqueeze(1), factor).view(roots.shape[:2])
        return wanted - torch.einsum("nvc,nv->nc", roots, solved)
