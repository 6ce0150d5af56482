"""Distributions of LoRA matrices whose columns share one covariance, or whose entries share one scale.

All costs are in the rank: one triangular product or solve a layer, no inverse, no second factorisation, no
covariance that is copied for each column, no synchronisation with the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, register_kl

from bayeslora.models.wishart import ONE_DRAW, batch_shape_of, log_det

__all__ = ["ColumnNormal", "IsotropicNormal", "base_of"]


class ColumnNormal(TorchDistribution):
    r"""Independent normal columns a_i in R^r that share one covariance: a_i ~ N(loc_i, scale^2 Sigma), i = 1 ... n.

    With ``mixture`` pi they are weighted sums of N draws: a_i ~ N(loc_i, scale^2 \|pi\|^2 Sigma).

    Args:
        loc: means (..., n, r), one row for each column of the LoRA matrix.
        scale: standard deviation that multiplies the factor, broadcastable to (..., 1, 1).
        scale_tril: lower Cholesky factor of Sigma, broadcastable to (..., r, r).
        precision_tril: in place of it, T with Sigma^-1 = T T^T, T lower triangular. Neither: Sigma = I.
        mixture: weights pi (..., N) of draws.
        validate_args: check the arguments and values, at the price of a synchronisation with the host.

    Raises:
        ValueError: both ``scale_tril`` and ``precision_tril`` are given.
    """

    arg_constraints = {"loc": constraints.independent(constraints.real, 2), "scale": constraints.positive}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        scale_tril: Tensor | None = None,
        precision_tril: Tensor | None = None,
        mixture: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if scale_tril is not None and precision_tril is not None:
            raise ValueError("ColumnNormal takes scale_tril or precision_tril, not both.")
        self.loc, self.scale, self.scale_tril, self.precision_tril = loc, scale, scale_tril, precision_tril
        self.mixture = mixture
        shapes = [value.shape[:-2] for value in (loc, scale, scale_tril, precision_tril) if value is not None]
        shapes += [] if mixture is None else [mixture.shape[:-1]]
        super().__init__(batch_shape_of(*shapes), loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ColumnNormal:
        """The same law over a larger batch."""
        loc = self.loc.expand(*batch_shape, *self.event_shape)
        return ColumnNormal(loc, self.scale, self.scale_tril, self.precision_tril, self.mixture, validate_args=False)

    @property
    def independent_entries(self) -> bool:
        """Whether entries are known to be independent, each with the standard deviation ``scale``."""
        return self.scale_tril is self.precision_tril is self.mixture is None

    @property
    def mean(self) -> Tensor:
        """Means (..., n, r)."""
        return self.loc.expand(self._extended_shape())

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance of one column, (..., r, r)."""
        root = self._root()
        return self._variance() * (root.mT @ root)

    @property
    def precision_matrix(self) -> Tensor:
        """Inverse covariance of one column, (..., r, r)."""
        eye = torch.eye(self.event_shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        columns = self._whiten(eye)
        return columns @ columns.mT / self._variance()

    @property
    def variance(self) -> Tensor:
        """Variances of the entries, (..., n, r)."""
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).expand(self._extended_shape())

    def rsample(self, sample_shape: torch.Size = ONE_DRAW) -> Tensor:
        """Draws (sample_shape, ..., n, r)."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        scale = self.scale if self.mixture is None else self.scale * self._length().sqrt()
        if self.scale_tril is not None:
            return (noise @ (scale * self.scale_tril).mT).add_(self.loc)
        if self.precision_tril is not None:
            noise = torch.linalg.solve_triangular(self.precision_tril / scale, noise, upper=False, left=False)
            return noise + self.loc
        return (scale * noise).add_(self.loc)

    def log_prob(self, value: Tensor) -> Tensor:
        """Density (...) of all columns."""
        if self._validate_args:
            self._validate_sample(value)
        columns, rank = self.event_shape
        distance = self._distance(value - self.loc)
        return -columns * (self._log_root() + rank * math.log(2 * math.pi) / 2) - distance / 2

    def _whiten(self, rows: Tensor) -> Tensor:
        """Rows d^T (..., k, r) to (L^-1 d)^T with Sigma = L L^T; ``scale`` and ``mixture`` are left out."""
        if self.scale_tril is not None:
            return torch.linalg.solve_triangular(self.scale_tril.mT, rows, upper=True, left=False)
        return rows if self.precision_tril is None else rows @ self.precision_tril

    def _distance(self, rows: Tensor) -> Tensor:
        """Squared Mahalanobis length (...) of rows (..., k, r), summed over the rows."""
        squares = self._whiten(rows).square().sum((-2, -1))
        variance = self._variance()
        return squares / variance.reshape(variance.shape[:-2])

    def _variance(self) -> Tensor:
        """What multiplies Sigma, broadcastable to (..., 1, 1)."""
        square = self.scale.square()
        return square if self.mixture is None else square * self._length()

    def _length(self) -> Tensor:
        r"""\|pi\|^2, (..., 1, 1)."""
        assert self.mixture is not None
        return self.mixture.square().sum(-1, keepdim=True).unsqueeze(-1)

    def _root(self) -> Tensor:
        """R (..., r, r) with R^T R = Sigma; ``scale`` and ``mixture`` are left out."""
        if self.scale_tril is not None:
            return self.scale_tril.mT
        eye = torch.eye(self.event_shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        if self.precision_tril is None:
            return eye
        return torch.linalg.solve_triangular(self.precision_tril, eye, upper=False)

    def _log_root(self) -> Tensor:
        """Half the logarithm of the determinant (...) of one column's covariance."""
        log_scale = self.scale.log() if self.mixture is None else self.scale.log() + self._length().log() / 2
        result = self.event_shape[-1] * log_scale.squeeze(-1).squeeze(-1)
        if self.scale_tril is not None:
            return result + log_det(self.scale_tril)
        return result if self.precision_tril is None else result - log_det(self.precision_tril)

    def _same_factor(self, other: ColumnNormal) -> bool:
        """Whether both have one and the same Sigma and mixture, object for object: their covariances are multiples."""
        names = ("scale_tril", "precision_tril", "mixture")
        return all(getattr(self, name) is getattr(other, name) for name in names)


class IsotropicNormal(TorchDistribution):
    """A tensor of independent normal entries with mean zero and one standard deviation; one event.

    The density is one sum of squares: point estimates under this prior cost no elementwise temporaries.

    Args:
        scale: standard deviation, (...) the batch.
        shape: shape of the tensor.
        validate_args: check the arguments and values, at the price of a synchronisation with the host.
    """

    arg_constraints = {"scale": constraints.positive}
    has_rsample = True

    def __init__(self, scale: Tensor, shape: Sequence[int], validate_args: bool | None = None) -> None:
        self.scale = scale
        super().__init__(scale.shape, torch.Size(shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All real tensors of the shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> IsotropicNormal:
        """The same law over a larger batch."""
        return IsotropicNormal(self.scale.expand(*batch_shape), self.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Zero."""
        return self.scale.new_zeros(()).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """Variances of the entries."""
        return self._aligned(self.scale.square()).expand(self._extended_shape())

    def rsample(self, sample_shape: torch.Size = ONE_DRAW) -> Tensor:
        """Draws (sample_shape, ..., shape)."""
        shape = self._extended_shape(sample_shape)
        return self._aligned(self.scale) * torch.randn(shape, dtype=self.scale.dtype, device=self.scale.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Density (...) of the whole tensor."""
        if self._validate_args:
            self._validate_sample(value)
        flat = value.reshape(*value.shape[: value.dim() - len(self.event_shape)], -1)
        divisor, constant = self._constants
        return torch.linalg.vecdot(flat, flat) / divisor - constant

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor]:
        """What squares are divided by, and what is taken off."""
        entries = self.event_shape.numel()
        with torch.inference_mode(False):  # a law that is kept may be asked first in that mode, and then in a graph
            return -2 * self.scale.square(), entries * (self.scale.log() + math.log(2 * math.pi) / 2)

    def _aligned(self, scale: Tensor) -> Tensor:
        return scale.reshape(*scale.shape, *(1 for _ in self.event_shape))


def base_of(law: Distribution) -> Distribution:
    """The law without the wrappers by which parts of its batch are dimensions of an event (`to_event`)."""
    while isinstance(law, Independent):
        law = law.base_dist
    return law


@register_kl(ColumnNormal, ColumnNormal)
def _kl_column_normal(q: ColumnNormal, p: ColumnNormal) -> Tensor:
    """KL (...) summed over the columns; the trace and determinants are taken once a layer."""
    columns, rank = q.event_shape
    # A prior mean that is learned is the posterior's own; the batch may be that of the means alone.
    shift = q.loc.new_zeros(q.batch_shape) if q.loc is p.loc else p._distance(q.loc - p.loc)
    if q._same_factor(p):
        ratio = (q.scale / p.scale).square().squeeze(-1).squeeze(-1)
        return (shift + columns * rank * (ratio - 1 - ratio.log())) / 2
    ratio = (q._variance() / p._variance()).squeeze(-1).squeeze(-1)
    trace = ratio * p._whiten(q._root()).square().sum((-2, -1))
    return (shift + columns * (trace - rank)) / 2 + columns * (p._log_root() - q._log_root())


@register_kl(Independent, ColumnNormal)
def _kl_normal_column_normal(q: Independent, p: ColumnNormal) -> Tensor:
    """KL (...) of independent normal entries, (..., n, r) with both dimensions in the event, to columns."""
    if not isinstance(q.base_dist, Normal) or q.reinterpreted_batch_ndims != 2:
        # Formulas are registered by type, and `Independent` is one type for many laws. For those that this formula is
        # not about, PyTorch's protocol is this exception: it raises it too where nothing is registered, and
        # callers of `kl_divergence` (Pyro's and ours) then take a draw for an estimate.
        raise NotImplementedError(f"No closed form of the divergence from {q} to columns of normal entries.")
    columns, rank = q.event_shape
    variances = q.variance.sum(-2)
    trace = (variances * p.precision_matrix.diagonal(dim1=-2, dim2=-1)).sum(-1)
    log_ratio = columns * p._log_root() - q.base_dist.scale.log().sum((-2, -1))
    return (p._distance(q.mean - p.loc) + trace - columns * rank) / 2 + log_ratio
