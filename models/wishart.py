"""Wishart laws of Cholesky factors, whose costs are in the rank: no inverse, no second factorisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Gamma, biject_to, constraints, register_kl, transform_to
from torch.distributions.transforms import Transform

__all__ = ["DiagonalWishartCholesky", "LowerCholeskyVector", "WishartCholesky", "lower_cholesky"]

ONE_DRAW = torch.Size()


class _LowerCholesky(constraints.Constraint):
    """Lower-triangular matrices with a positive diagonal, with a bijection from vectors of r (r + 1) / 2 numbers.

    PyTorch registers no bijection for its own constraint: its transform reads the lower triangle of a full matrix, so
    that the other entries of an unconstrained guide would have no posterior to match.
    """

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        """Whether each matrix (...) is one."""
        return constraints.lower_cholesky.check(value)


lower_cholesky = _LowerCholesky()


class LowerCholeskyVector(Transform):
    """Vector (..., r (r + 1) / 2) to lower Cholesky factor (..., r, r); the diagonal is exponentiated."""

    domain = constraints.real_vector
    codomain = lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowerCholeskyVector)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        rank = _rank(x.shape[-1])
        row, column = torch.tril_indices(rank, rank, device=x.device)
        matrix = x.new_zeros(*x.shape[:-1], rank, rank)
        matrix[..., row, column] = x
        return matrix.tril(-1) + matrix.diagonal(dim1=-2, dim2=-1).exp().diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        row, column = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        matrix = y.tril(-1) + y.diagonal(dim1=-2, dim2=-1).log().diag_embed()
        return matrix[..., row, column]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithm of the Jacobian's determinant (...): the sum of the diagonal's logarithms."""
        return log_det(y)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the factor for a vector's shape."""
        rank = _rank(shape[-1])
        return torch.Size((*shape[:-1], rank, rank))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the vector for a factor's shape."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


@biject_to.register(_LowerCholesky)
@transform_to.register(_LowerCholesky)
def _to_lower_cholesky(constraint: _LowerCholesky) -> LowerCholeskyVector:
    return LowerCholeskyVector()


class WishartCholesky(TorchDistribution):
    r"""Law of the lower Cholesky factor L of a Wishart matrix S = L L^T with E[S] = df * scale_tril scale_tril^T.

    Bartlett's decomposition: L = scale_tril T with T lower triangular, T_ii^2 ~ chi^2(df - i) for i = 0 ... r - 1 and
    standard normal entries below the diagonal (Anderson, An Introduction to Multivariate Statistical Analysis, 7.2).
    The chi^2 draws carry implicit reparameterisation gradients with respect to ``df``.

    Args:
        df: degrees of freedom, any real above r - 1: a number, or (...) broadcastable to the batch.
        scale_tril: lower Cholesky factor of the scale matrix, (..., r, r).
        validate_args: check the arguments and values, at the price of a synchronisation with the host.

    Raises:
        ValueError: ``validate_args`` is on and ``df`` is not above r - 1.
    """

    support = lower_cholesky
    has_rsample = True

    def __init__(self, df: float | Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        # A fill, unlike torch.tensor(df), does not copy from the host.
        df = df if isinstance(df, Tensor) else scale_tril.new_full((), df)
        batch_shape = batch_shape_of(df.shape, scale_tril.shape[:-2])
        self._df = df.expand(batch_shape)
        self._scale_tril = scale_tril.expand(*batch_shape, *scale_tril.shape[-2:])
        super().__init__(batch_shape, scale_tril.shape[-2:], validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, Any]:
        """Constraints of the arguments; that of ``df`` depends on r."""
        return {
            "df": constraints.greater_than(self.event_shape[-1] - 1),
            "scale_tril": constraints.lower_cholesky,
        }

    @property
    def df(self) -> Tensor:
        """Degrees of freedom (...)."""
        return self._df

    @property
    def scale_tril(self) -> Tensor:
        """Lower Cholesky factor of the scale matrix, (..., r, r)."""
        return self._scale_tril

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> WishartCholesky:
        """The same law over a larger batch."""
        scale_tril = self.scale_tril.expand(*batch_shape, *self.event_shape)
        return WishartCholesky(self.df.expand(*batch_shape), scale_tril, validate_args=False)

    @property
    def _shapes(self) -> Tensor:
        """Shape parameters (..., r) of the Gamma laws behind Bartlett's chi^2 draws: (df - i) / 2."""
        index = torch.arange(self.event_shape[-1], device=self.df.device, dtype=self.df.dtype)
        return (self.df.unsqueeze(-1) - index) / 2

    @property
    def mean(self) -> Tensor:
        """E[L], (..., r, r); E[L L^T] is ``df * scale_tril scale_tril^T``."""
        half = self._shapes
        root = math.sqrt(2) * (torch.lgamma(half + 0.5) - torch.lgamma(half)).exp()
        return self.scale_tril * root.unsqueeze(-2)

    def rsample(self, sample_shape: torch.Size = ONE_DRAW) -> Tensor:
        """Draws (sample_shape, ..., r, r)."""
        return self.scale_tril @ self._bartlett(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Density (...) of L: the Wishart density of L L^T times 2^r prod_i L_ii^(r - i), i = 0 ... r - 1."""
        if self._validate_args:
            self._validate_sample(value)
        rank = self.event_shape[-1]
        log_diagonal = value.diagonal(dim1=-2, dim2=-1).log()
        # (df - r - 1) of the density and (r - i) of the Jacobian.
        power = 2 * self._shapes - 1
        whitened = torch.linalg.solve_triangular(self.scale_tril, value, upper=False)
        return (
            (power * log_diagonal).sum(-1)
            - whitened.square().sum((-2, -1)) / 2
            - self.df * (log_det(self.scale_tril) + rank * math.log(2) / 2)
            - self._log_gamma()
            + rank * math.log(2)
        )

    def _bartlett(self, sample_shape: torch.Size) -> Tensor:
        """Draws of T, (sample_shape, ..., r, r)."""
        squares = self._chi_squares().rsample(sample_shape)
        factor = torch.randn(self._extended_shape(sample_shape), dtype=squares.dtype, device=squares.device).tril_(-1)
        factor.diagonal(dim1=-2, dim2=-1).copy_(squares.sqrt())
        return factor

    def _chi_squares(self) -> Gamma:
        """Laws of the squares of T's diagonal (..., r)."""
        half = self._shapes
        return Gamma(half, half.new_full((), 0.5), validate_args=False)

    def _log_gamma(self) -> Tensor:
        """Logarithm of the multivariate gamma function at df / 2."""
        rank = self.event_shape[-1]
        return rank * (rank - 1) / 4 * math.log(math.pi) + torch.lgamma(self._shapes).sum(-1)


class DiagonalWishartCholesky(WishartCholesky):
    """The same law where the scale matrix is diagonal, and ``df`` a number: no matrix product, no triangular solve.

    Args:
        df: degrees of freedom, any real above r - 1.
        scale: diagonal (..., r) of the Cholesky factor of the scale matrix.
        validate_args: check the arguments and values, at the price of a synchronisation with the host.
    """

    def __init__(self, df: float, scale: Tensor, validate_args: bool | None = None) -> None:
        self.degrees, self.scale = df, scale
        rank = scale.shape[-1]
        TorchDistribution.__init__(self, scale.shape[:-1], torch.Size((rank, rank)), validate_args=validate_args)

    @property
    def df(self) -> Tensor:
        """Degrees of freedom (...)."""
        return self.scale.new_full(self.batch_shape, self.degrees)

    @property
    def scale_tril(self) -> Tensor:
        """Lower Cholesky factor (..., r, r) of the scale matrix."""
        return self.scale.diag_embed()

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiagonalWishartCholesky:
        """The same law over a larger batch."""
        scale = self.scale.expand(*batch_shape, self.scale.shape[-1])
        return DiagonalWishartCholesky(self.degrees, scale, validate_args=False)

    def rsample(self, sample_shape: torch.Size = ONE_DRAW) -> Tensor:
        """Draws (sample_shape, ..., r, r)."""
        return self.scale.unsqueeze(-1) * self._bartlett(sample_shape)

    def _chi_squares(self) -> Gamma:
        scale = self.scale
        return chi_squares(self.degrees, scale.shape, scale.dtype, scale.device)


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # a tensor of that mode could be in no graph later
def chi_squares(df: float, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Gamma:
    """Laws (..., r) of chi^2(df - i), i = 0 ... r - 1; made once, since all steps of training ask for them."""
    half = (torch.full(shape, df, dtype=dtype, device=device) - torch.arange(shape[-1], dtype=dtype, device=device)) / 2
    return Gamma(half, torch.full_like(half, 0.5), validate_args=False)


@register_kl(WishartCholesky, WishartCholesky)
def _kl_wishart_cholesky(q: WishartCholesky, p: WishartCholesky) -> Tensor:
    """KL (...) of the two Wishart laws: that of their factors is the same, since the factor is a bijection of them."""
    rank = q.event_shape[-1]
    ratio = torch.linalg.solve_triangular(p.scale_tril, q.scale_tril, upper=False)
    return (
        p.df * (log_det(p.scale_tril) - log_det(q.scale_tril))
        + q.df * (ratio.square().sum((-2, -1)) - rank) / 2
        + p._log_gamma()
        - q._log_gamma()
        + (q.df - p.df) * torch.digamma(q._shapes).sum(-1) / 2
    )


@register_kl(DiagonalWishartCholesky, DiagonalWishartCholesky)
def _kl_diagonal_wishart(q: DiagonalWishartCholesky, p: DiagonalWishartCholesky) -> Tensor:
    """The same with as many degrees of freedom in both, where all that depends on those alone cancels."""
    if q.degrees != p.degrees:
        return _kl_wishart_cholesky(q, p)
    log_ratio = p.scale.log().sum(-1) - q.scale.log().sum(-1)
    squares = (q.scale / p.scale).square().sum(-1)
    return p.degrees * log_ratio + q.degrees * (squares - q.event_shape[-1]) / 2


def batch_shape_of(*shapes: torch.Size) -> torch.Size:
    """Broadcast shape; the usual case of equal ones is quick, since PyTorch takes a tenth of a millisecond."""
    distinct = {shape for shape in shapes if shape} or {torch.Size()}
    return distinct.pop() if len(distinct) == 1 else torch.broadcast_shapes(*distinct)


def log_det(factor: Tensor) -> Tensor:
    """Logarithm of the determinant (...) of triangular matrices (..., r, r)."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _rank(entries: int) -> int:
    """Rank r such that a lower triangle has r (r + 1) / 2 entries."""
    return (math.isqrt(8 * entries + 1) - 1) // 2
