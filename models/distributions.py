"""Distributions of LoRA matrices: Cholesky factors of Wishart matrices, and columns that share one covariance.

All costs are in the rank: one triangular product or solve a layer, no inverse, no second factorisation, no
covariance that is copied for each column, no synchronisation with the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Gamma, Independent, Normal, biject_to, constraints, register_kl, transform_to
from torch.distributions.transforms import Transform

__all__ = ["ColumnNormal", "IsotropicNormal", "LowerCholeskyVector", "WishartCholesky", "lower_cholesky"]

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
        return _log_det(y)

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
        batch_shape = _batch_shape(df.shape, scale_tril.shape[:-2])
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
            - self.df * (_log_det(self.scale_tril) + rank * math.log(2) / 2)
            - self._log_gamma()
            + rank * math.log(2)
        )

    def _bartlett(self, sample_shape: torch.Size) -> Tensor:
        """Draws of T, (sample_shape, ..., r, r)."""
        half = self._shapes
        squares = Gamma(half, half.new_full((), 0.5), validate_args=False).rsample(sample_shape)
        factor = torch.randn(self._extended_shape(sample_shape), dtype=half.dtype, device=half.device).tril_(-1)
        factor.diagonal(dim1=-2, dim2=-1).copy_(squares.sqrt())
        return factor

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
        super().__init__(_batch_shape(*shapes), loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ColumnNormal:
        """The same law over a larger batch."""
        loc = self.loc.expand(*batch_shape, *self.event_shape)
        return ColumnNormal(loc, self.scale, self.scale_tril, self.precision_tril, self.mixture, validate_args=False)

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
            return result + _log_det(self.scale_tril)
        return result if self.precision_tril is None else result - _log_det(self.precision_tril)

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
        entries = self.event_shape.numel()
        flat = value.reshape(*value.shape[: value.dim() - len(self.event_shape)], -1)
        squares = torch.linalg.vecdot(flat, flat) / (-2 * self.scale.square())
        return squares - entries * (self.scale.log() + math.log(2 * math.pi) / 2)

    def _aligned(self, scale: Tensor) -> Tensor:
        return scale.reshape(*scale.shape, *(1 for _ in self.event_shape))


@register_kl(WishartCholesky, WishartCholesky)
def _kl_wishart_cholesky(q: WishartCholesky, p: WishartCholesky) -> Tensor:
    """KL (...) of the two Wishart laws: that of their factors is the same, since the factor is a bijection of them."""
    rank = q.event_shape[-1]
    ratio = torch.linalg.solve_triangular(p.scale_tril, q.scale_tril, upper=False)
    return (
        p.df * (_log_det(p.scale_tril) - _log_det(q.scale_tril))
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


@register_kl(ColumnNormal, ColumnNormal)
def _kl_column_normal(q: ColumnNormal, p: ColumnNormal) -> Tensor:
    """KL (...) summed over the columns; the trace and determinants are taken once a layer."""
    columns, rank = q.event_shape
    shift = p._distance(q.loc - p.loc)
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


def _batch_shape(*shapes: torch.Size) -> torch.Size:
    """Broadcast shape; the usual case of equal ones is quick, since PyTorch takes a tenth of a millisecond."""
    distinct = {shape for shape in shapes if shape} or {torch.Size()}
    return distinct.pop() if len(distinct) == 1 else torch.broadcast_shapes(*distinct)


def _log_det(factor: Tensor) -> Tensor:
    """Logarithm of the determinant (...) of triangular matrices (..., r, r)."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _rank(entries: int) -> int:
    """Rank r such that a lower triangle has r (r + 1) / 2 entries."""
    return (math.isqrt(8 * entries + 1) - 1) // 2
