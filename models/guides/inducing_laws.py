r"""Laws of stacked matrices in terms of a few inducing values a matrix.

A matrix W (n columns, rank r) is ``loc + scale W~``. Under the prior the entries of W~ are N(0, 1). Inducing values U
(k_c x k_r) are auxiliary: under p they are N(0, 1), too, and in spectral form

    p(W~ | U) = N(V_c [sqrt(e) o U] V_r^T, Sigma),  Sigma = I - (V_c (x) V_r) diag(e) (V_c (x) V_r)^T,

with orthonormal frames V_c, V_r and the part e_ij = s_i t_j in (0, 1) of each direction's variance that U explains. So
U leaves the prior of W as it is, whatever frames and spectra are, and p(U | W~) = N(sqrt(e) o b, 1 - e), where b is
V_c^T W~ V_r. The posterior is q(U) = N(m, sd^2); q(W~ | U) has the mean of p(W~ | U) and the covariance lam^2 Sigma.

In terms of inducing inputs Z and noise D: K = Z Z^T + D^2 = L L^T, and L^-1 Z = P diag(sqrt(s)) V^T is a singular value
decomposition, for either side; U here is P_c^T L_c^-1 U L_r^-T P_r there. It needs no jitter, and a side may be smaller
than the number of its inducing inputs.

References:
    Ritter, Kukla, Zhang and Li, *Sparse uncertainty representation in deep learning with inducing weights*, NeurIPS
    2021, section 3; Lin et al., *Bayesian-LoRA*, arXiv 2601.21003.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl

from bayeslora.models.distributions import ColumnNormal
from bayeslora.models.wishart import ONE_DRAW, batch_shape_of

__all__ = ["AugmentedNormal", "DrawnNormal", "Frames", "InducedNormal"]

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Frames:
    """Directions of both sides that inducing values are about, and how much of the variance there they explain.

    Attributes:
        columns: orthonormal V_c, (..., n, k_c).
        rank: orthonormal V_r, (..., r, k_r).
        explained: e, (..., k_c, k_r), each in (0, 1).
    """

    columns: Tensor
    rank: Tensor
    explained: Tensor

    def block(self, matrix: Tensor) -> Tensor:
        """Coordinates V_c^T W V_r (..., k_c, k_r) of a matrix (..., n, r)."""
        return self.columns.mT @ matrix @ self.rank

    def matrix(self, block: Tensor) -> Tensor:
        """The matrix V_c b V_r^T (..., n, r) of coordinates (..., k_c, k_r)."""
        return self.columns @ block @ self.rank.mT


class InducedNormal(TorchDistribution):
    """q(W) with the inducing values integrated out: a normal law.

    Coordinates b_ij in the frames are independent, N(sqrt(e_ij) m_ij, e_ij sd_ij^2 + lam^2 (1 - e_ij)), and all that is
    orthogonal to them is N(0, lam^2).

    Args:
        loc: offset of the mean (..., n, r).
        scale: prior standard deviation of an entry, (..., 1, 1).
        frames: of both sides.
        mean: m of the inducing values (..., k_c, k_r).
        deviation: sd of the inducing values (..., k_c, k_r).
        lam: standard deviation given the inducing values, as a multiple of the prior's, (..., 1, 1).
        validate_args: check values, at the price of a synchronisation with the host.
    """

    arg_constraints = {"loc": constraints.independent(constraints.real, 2), "scale": constraints.positive}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        frames: Frames,
        mean: Tensor,
        deviation: Tensor,
        lam: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale, self.frames = loc, scale, frames
        self.inducing_mean, self.deviation, self.lam = mean, deviation, lam
        explained = frames.explained
        self.block_mean = explained.sqrt() * mean
        self.block_variance = explained * deviation.square() + lam.square() * (1 - explained)
        super().__init__(batch_shape_of(loc.shape[:-2], mean.shape[:-2]), loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> InducedNormal:
        """The same law over a larger batch."""
        loc = self.loc.expand(*batch_shape, *self.event_shape)
        parts = (self.scale, self.frames, self.inducing_mean, self.deviation, self.lam)
        return type(self)(loc, *parts, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Means (..., n, r)."""
        return self.loc + self.scale * self.frames.matrix(self.block_mean)

    @property
    def variance(self) -> Tensor:
        """Variances of the entries, (..., n, r)."""
        surplus = self.block_variance - self.lam.square()
        inside = self.frames.columns.square() @ surplus @ self.frames.rank.square().mT
        return self.scale.square() * (self.lam.square() + inside)

    def rsample(self, sample_shape: torch.Size = ONE_DRAW) -> Tensor:
        """Draws (sample_shape, ..., n, r), each of one matrix of noise."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        block = self.block_mean + (self.block_variance.sqrt() - self.lam) * self.frames.block(noise)
        return self.loc + self.scale * (self.lam * noise + self.frames.matrix(block))

    def log_prob(self, value: Tensor) -> Tensor:
        """Density (...) of the whole matrix."""
        if self._validate_args:
            self._validate_sample(value)
        whitened = (value - self.loc) / self.scale
        block = self.frames.block(whitened)
        inside = ((block - self.block_mean).square() / self.block_variance).sum((-2, -1))
        # Not a difference of squares, which would leave nothing where the noise is small.
        outside = (whitened - self.frames.matrix(block)).square().sum((-2, -1)) / _flat(self.lam.square())
        log_det = self._log_det() + 2 * self.entries * _flat(self.scale.log())
        return -(inside + outside + log_det + self.entries * LOG_2PI) / 2

    @property
    def entries(self) -> int:
        """Number of entries n r."""
        return self.event_shape.numel()

    @property
    def remaining(self) -> int:
        """Number of directions that inducing values say nothing of."""
        return self.entries - self.block_mean.shape[-2] * self.block_mean.shape[-1]

    def _log_det(self) -> Tensor:
        """Logarithm of the determinant (...) of the covariance, less that of the scale."""
        return self.block_variance.log().sum((-2, -1)) + 2 * self.remaining * _flat(self.lam.log())


class AugmentedNormal(InducedNormal):
    """The same law, whose divergence from the prior is the published bound on it, that of (W, U) jointly."""

    def gap(self) -> Tensor:
        """By how much (...) the bound is above the divergence: E_q KL(q(U | W) || p(U | W)), with p around ``loc``."""
        explained, lam, deviation = self.frames.explained, self.lam.square(), self.deviation.square()
        square = (1 - explained) * (deviation + self.inducing_mean.square()) + explained * lam
        return (square - 1 - (deviation * lam / self.block_variance).log()).sum((-2, -1)) / 2


class DrawnNormal(InducedNormal):
    """q(W | U) at inducing values that were drawn from any law, such as a flow.

    The density of W itself is not known then. `log_prob` is log q(W | U) + log q(U) - log p(U | W), with p around
    ``loc``: its mean is above that of log q(W), so that a bound on the evidence stays one.

    Args:
        loc: offset of the mean (..., n, r).
        scale: prior standard deviation of an entry, (..., 1, 1).
        frames: of both sides.
        drawn: inducing values U (..., k_c, k_r).
        density: log q(U), (...).
        lam: standard deviation given the inducing values, as a multiple of the prior's, (..., 1, 1).
        validate_args: check values, at the price of a synchronisation with the host.
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        frames: Frames,
        drawn: Tensor,
        density: Tensor,
        lam: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(loc, scale, frames, drawn, torch.zeros_like(drawn), lam, validate_args=validate_args)
        self.density = density

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DrawnNormal:
        """The same law over a larger batch."""
        loc = self.loc.expand(*batch_shape, *self.event_shape)
        return DrawnNormal(
            loc, self.scale, self.frames, self.inducing_mean, self.density, self.lam, validate_args=False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """What stands for the density (...) in a bound."""
        block = self.frames.block((value - self.loc) / self.scale)
        return super().log_prob(value) + self.density - self._reverse(block, torch.zeros_like(block))

    def expected_reverse(self) -> Tensor:
        """E log p(U | W) over q(W | U), (...)."""
        return self._reverse(self.block_mean, self.block_variance)

    def _reverse(self, mean: Tensor, variance: Tensor) -> Tensor:
        """E log p(U | b), (...), over coordinates b of given moments."""
        explained = self.frames.explained
        square = (self.inducing_mean - explained.sqrt() * mean).square() + explained * variance
        return -(square / (1 - explained) + (1 - explained).log() + LOG_2PI).sum((-2, -1)) / 2


@register_kl(InducedNormal, ColumnNormal)
def _kl_induced(q: InducedNormal, p: ColumnNormal) -> Tensor:
    """KL (...) in closed form from columns without covariance or mixture weights."""
    if not p.independent_entries:
        # Formulas are registered by type, and this one is of columns without a covariance. PyTorch's protocol for what
        # has none is this exception, by which callers of `kl_divergence` are told to take a draw for an estimate.
        raise NotImplementedError(f"No closed form of the divergence from {q} to columns with a covariance.")
    ratio = _flat((q.scale / p.scale).square())
    trace = q.block_variance.sum((-2, -1)) + q.remaining * _flat(q.lam.square())
    shift = ((q.mean - p.loc) / p.scale).square().sum((-2, -1))
    return (ratio * trace + shift - q.entries * (1 + ratio.log()) - q._log_det()) / 2


@register_kl(AugmentedNormal, ColumnNormal)
def _kl_augmented(q: AugmentedNormal, p: ColumnNormal) -> Tensor:
    """KL (...) of (W, U) jointly."""
    return _kl_induced(q, p) + q.gap()


@register_kl(DrawnNormal, ColumnNormal)
def _kl_drawn(q: DrawnNormal, p: ColumnNormal) -> Tensor:
    """Estimate (...) of the KL of (W, U) jointly by the U that was drawn, in closed form for W."""
    return _kl_induced(q, p) + q.density - q.expected_reverse()


def _flat(value: Tensor) -> Tensor:
    """(..., 1, 1) as (...)."""
    return value.squeeze(-1).squeeze(-1)
