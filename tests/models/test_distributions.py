"""Laws of LoRA matrices against SciPy, PyTorch and Monte Carlo."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from scipy import stats
from torch.distributions import biject_to, kl_divergence

from bayeslora.models.distributions import ColumnNormal, IsotropicNormal
from bayeslora.models.wishart import DiagonalWishartCholesky, LowerCholeskyVector, WishartCholesky

DRAWS = 20_000
#: Bound on a mean's distance from its expectation in standard errors: 5 is exceeded by chance once in 1.7 million.
ERRORS = 5.0


def factor(rank: int, *batch: int) -> torch.Tensor:
    """A random lower Cholesky factor, not far from the identity."""
    matrix = 0.4 * torch.randn(*batch, rank, rank, dtype=torch.float64)
    return matrix.tril(-1) + (0.5 * matrix.diagonal(dim1=-2, dim2=-1)).exp().diag_embed()


def assert_mean(draws: torch.Tensor, expected: torch.Tensor) -> None:
    """The mean over the first dimension is ``expected`` within Monte Carlo error."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= ERRORS * error + 1e-12).all()


def columns(kind: str, loc: torch.Tensor, scale: torch.Tensor) -> ColumnNormal:
    """Columns of each parameterisation over a batch (2,)."""
    rank = loc.shape[-1]
    return {
        "identity": lambda: ColumnNormal(loc, scale),
        "covariance": lambda: ColumnNormal(loc, scale, scale_tril=factor(rank, 2)),
        "precision": lambda: ColumnNormal(loc, scale, precision_tril=factor(rank, 2)),
        "mixture": lambda: ColumnNormal(loc, scale, factor(rank, 2), mixture=torch.rand(2, 4, dtype=loc.dtype)),
    }[kind]()


def multivariate(law: ColumnNormal) -> torch.distributions.Distribution:
    """The same law by PyTorch, with a copy of the covariance for every column."""
    covariance = law.covariance_matrix.unsqueeze(-3)
    return torch.distributions.Independent(torch.distributions.MultivariateNormal(law.loc, covariance), 1)


KINDS = ("identity", "covariance", "precision", "mixture")


@pytest.fixture(params=KINDS)
def law(request: pytest.FixtureRequest) -> ColumnNormal:
    loc = torch.randn(2, 4, 3, dtype=torch.float64)
    return columns(request.param, loc, torch.tensor([0.7, 1.3], dtype=torch.float64)[:, None, None])


class TestWishartCholesky:
    @pytest.mark.parametrize(("rank", "df"), [(1, 0.5), (2, 1.3), (3, 3.0), (4, 9.5)])
    def test_density_is_scipys_times_the_jacobian(self, rank: int, df: float) -> None:
        scale = factor(rank)
        law = WishartCholesky(df, scale)
        value = law.sample()

        # The Jacobian of L -> L L^T on the lower triangles, by automatic differentiation.
        row, column = torch.tril_indices(rank, rank)

        def product(entries: torch.Tensor) -> torch.Tensor:
            matrix = entries.new_zeros(rank, rank).index_put((row, column), entries)
            return (matrix @ matrix.mT)[row, column]

        jacobian = torch.autograd.functional.jacobian(product, value[row, column]).slogdet().logabsdet
        if df > rank - 1 and rank > 1 and df < rank:
            # SciPy refuses df below the rank; PyTorch's own density does not.
            with pytest.warns(UserWarning, match="Low df"):
                wishart = torch.distributions.Wishart(torch.tensor(df, dtype=torch.float64), scale_tril=scale)
            expected = wishart.log_prob(value @ value.mT)
        else:
            expected = stats.wishart(df, (scale @ scale.mT).numpy()).logpdf((value @ value.mT).numpy())
        torch.testing.assert_close(law.log_prob(value), torch.as_tensor(expected) + jacobian)

    def test_moments_of_the_draws(self) -> None:
        scale = factor(3, 2)
        df = torch.tensor([3.5, 12.0], dtype=torch.float64)
        law = WishartCholesky(df, scale)
        draws = law.rsample((DRAWS,))
        wishart = torch.distributions.Wishart(df, scale_tril=scale)
        products = draws @ draws.mT
        assert_mean(draws, law.mean)
        assert_mean(products, wishart.mean)
        assert_mean((products - wishart.mean).square(), wishart.variance)

    def test_density_integrates_to_one(self) -> None:
        law, proposal = WishartCholesky(5.0, factor(3)), WishartCholesky(4.0, factor(3))
        draws = proposal.sample((DRAWS,))
        assert_mean((law.log_prob(draws) - proposal.log_prob(draws)).exp(), torch.ones(()))

    def test_degrees_of_freedom_have_a_gradient(self) -> None:
        # E[trace L L^T] = df trace V, so its derivative is trace V.
        df, scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True), factor(3)
        trace = WishartCholesky(df, scale).rsample((DRAWS,)).square().sum((-2, -1)).mean()
        (gradient,) = torch.autograd.grad(trace, df)
        # The derivative of one draw's trace has a standard deviation below twice its mean.
        expected = scale.square().sum()
        assert (gradient - expected).abs() < ERRORS * 2 * expected / math.sqrt(DRAWS)

    def test_batches_expand_and_events(self) -> None:
        law = WishartCholesky(4.0, factor(2)).expand((3,)).to_event(1)
        assert law.batch_shape == () and law.event_shape == (3, 2, 2)
        value = law.sample((5,))
        assert value.shape == (5, 3, 2, 2) and law.log_prob(value).shape == (5,)
        assert law.support.check(value).all()

    def test_validation_names_the_boundary(self) -> None:
        with pytest.raises(ValueError, match="df"):
            WishartCholesky(1.0, factor(2), validate_args=True)

    def test_bijection(self) -> None:
        transform = biject_to(WishartCholesky.support)
        assert transform == LowerCholeskyVector()
        vector = torch.randn(4, 6, dtype=torch.float64)
        value = transform(vector)
        assert transform.forward_shape((4, 6)) == value.shape == (4, 3, 3)
        assert transform.inverse_shape(value.shape) == vector.shape
        torch.testing.assert_close(transform.inv(value), vector)
        row, column = torch.tril_indices(3, 3)
        jacobian = torch.autograd.functional.jacobian(lambda x: transform(x)[row, column], vector[0])
        torch.testing.assert_close(transform.log_abs_det_jacobian(vector, value)[0], jacobian.slogdet().logabsdet)

    def test_nuts_recovers_its_mean(self) -> None:
        law = WishartCholesky(6.0, torch.eye(2, dtype=torch.float64) / math.sqrt(6.0))
        pyro.set_rng_seed(1)
        kernel = NUTS(lambda: pyro.sample("L", law), max_tree_depth=3)
        chain = MCMC(kernel, num_samples=100, warmup_steps=30, disable_progbar=True)
        chain.run()
        draws = chain.get_samples()["L"]
        # 100 draws of a three-dimensional law by NUTS are worth about as many independent ones:
        # 5 errors are half a standard deviation.
        assert ((draws.mean(0) - law.mean).abs() <= 0.5 * law.sample((1000,)).std(0) + 1e-9).all()


class TestWishartDivergence:
    def test_against_monte_carlo(self) -> None:
        q, p = WishartCholesky(7.5, factor(3)), WishartCholesky(5.0, factor(3))
        draws = q.sample((DRAWS,))
        assert_mean(q.log_prob(draws) - p.log_prob(draws), kl_divergence(q, p))

    def test_against_pytorch_and_the_papers_formula(self) -> None:
        q_scale, p_scale, df = factor(3), factor(3), torch.tensor(6.0, dtype=torch.float64)
        found = kl_divergence(WishartCholesky(8.0, q_scale), WishartCholesky(6.0, p_scale))
        other = torch.distributions.Wishart(torch.tensor(8.0, dtype=torch.float64), scale_tril=q_scale)
        torch.testing.assert_close(found, kl_divergence(other, torch.distributions.Wishart(df, scale_tril=p_scale)))
        # Equation 11: nu / 2 (tr V - r - log |V|) for a scale V against I.
        v = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
        eye = torch.eye(3, dtype=torch.float64)
        found = kl_divergence(WishartCholesky(df, v.sqrt().diag_embed()), WishartCholesky(df, eye))
        torch.testing.assert_close(found, df / 2 * (v.sum() - 3 - v.log().sum()))

    def test_never_negative_and_zero_at_equality(self) -> None:
        q, p = WishartCholesky(5.0, factor(3, 50)), WishartCholesky(4.0, factor(3, 50))
        assert (kl_divergence(q, p) > 0).all()
        torch.testing.assert_close(kl_divergence(q, q), torch.zeros(50, dtype=torch.float64))

    def test_pyro_finds_it_inside_events(self) -> None:
        q, p = WishartCholesky(5.0, factor(3, 4)), WishartCholesky(4.0, factor(3, 4))
        inside = kl_divergence(q.to_event(1), p.to_event(1))
        torch.testing.assert_close(inside, kl_divergence(q, p).sum())


class TestDiagonalWishartCholesky:
    def pair(self, df: float = 6.5) -> tuple[DiagonalWishartCholesky, WishartCholesky]:
        """The law with a diagonal scale matrix, and the same as a law with any."""
        scale = torch.rand(5, 3, dtype=torch.float64, requires_grad=True) + 0.5
        return DiagonalWishartCholesky(df, scale), WishartCholesky(df, scale.diag_embed())

    def test_draws_and_densities_are_those_of_the_general_law(self) -> None:
        law, general = self.pair()
        torch.manual_seed(3)
        value = law.rsample((4,))
        torch.manual_seed(3)
        assert torch.equal(value, general.rsample((4,)))
        torch.testing.assert_close(law.log_prob(value), general.log_prob(value))
        torch.testing.assert_close(law.mean, general.mean)
        assert law.expand((2, 5)).rsample().shape == (2, 5, 3, 3)
        with pytest.raises(ValueError, match="df"):
            DiagonalWishartCholesky(1.5, law.scale, validate_args=True)

    @pytest.mark.parametrize("df", [6.5, 4.0])
    def test_divergences_and_their_gradients_are_those_of_the_general_law(self, df: float) -> None:
        (q, general), (p, other) = self.pair(), self.pair(df)
        found, expected = kl_divergence(q, p), kl_divergence(general, other)
        torch.testing.assert_close(found, expected)
        scales = (q.scale, p.scale)
        gradients = [torch.autograd.grad(value.sum(), scales, retain_graph=True) for value in (found, expected)]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(kl_divergence(q, other), expected)


class TestDirichletDivergence:
    def test_never_negative_zero_at_equality_and_the_known_value(self) -> None:
        ones = dist.Dirichlet(torch.ones(4, dtype=torch.float64))
        found = kl_divergence(dist.Dirichlet(torch.full((4,), 10.0, dtype=torch.float64)), ones)
        torch.testing.assert_close(found, torch.tensor(2.35, dtype=torch.float64), atol=5e-3, rtol=0)
        torch.testing.assert_close(kl_divergence(ones, ones), torch.zeros((), dtype=torch.float64))
        many = dist.Dirichlet(torch.rand(200, 4, dtype=torch.float64) * 3 + 0.05)
        assert (kl_divergence(many, ones) >= 0).all()


class TestColumnNormal:
    def test_density_is_pytorchs(self, law: ColumnNormal) -> None:
        value = law.sample((6,))
        assert value.shape == (6, 2, 4, 3)
        torch.testing.assert_close(law.log_prob(value), multivariate(law).log_prob(value))

    def test_moments_of_the_draws(self, law: ColumnNormal) -> None:
        draws = law.rsample((DRAWS,))
        assert_mean(draws, law.mean)
        assert_mean((draws - law.mean).square(), law.variance)
        outer = (draws - law.mean)[:, :, 0].unsqueeze(-1) * (draws - law.mean)[:, :, 0].unsqueeze(-2)
        assert_mean(outer, law.covariance_matrix)
        crossed = (draws - law.mean)[:, :, 0] * (draws - law.mean)[:, :, 1]
        assert_mean(crossed, torch.zeros(2, 3))

    def test_precision_is_the_inverse_of_the_covariance(self, law: ColumnNormal) -> None:
        product = law.precision_matrix @ law.covariance_matrix
        torch.testing.assert_close(product, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))

    @pytest.mark.parametrize("other", KINDS)
    def test_divergence_is_pytorchs(self, law: ColumnNormal, other: str) -> None:
        p = columns(other, torch.randn_like(law.loc), 0.5 * law.scale + 0.3)
        found = kl_divergence(law, p)
        torch.testing.assert_close(found, kl_divergence(multivariate(law), multivariate(p)))
        assert (found > 0).all()
        torch.testing.assert_close(kl_divergence(law.to_event(1), p.to_event(1)), found.sum())
        torch.testing.assert_close(kl_divergence(law, law), torch.zeros(2, dtype=torch.float64))

    def test_divergence_against_monte_carlo(self, law: ColumnNormal) -> None:
        p = columns("precision", law.loc + 0.3, law.scale * 1.2)
        draws = law.sample((DRAWS,))
        assert_mean(law.log_prob(draws) - p.log_prob(draws), kl_divergence(law, p))

    def test_shared_factor_gives_the_same_divergence_as_an_equal_one(self) -> None:
        shared, loc = factor(3, 2), torch.randn(2, 4, 3, dtype=torch.float64)
        scale = torch.full((2, 1, 1), 0.7, dtype=torch.float64)
        q = ColumnNormal(loc, scale, precision_tril=shared)
        same = ColumnNormal(loc + 1, 2 * scale, precision_tril=shared)
        equal = ColumnNormal(loc + 1, 2 * scale, precision_tril=shared.clone())
        torch.testing.assert_close(kl_divergence(q, same), kl_divergence(q, equal))

    def test_shared_mixture_gives_the_same_divergence_as_an_equal_one(self) -> None:
        shared, loc = factor(3, 2), torch.randn(2, 4, 3, dtype=torch.float64)
        scale = torch.full((2, 1, 1), 0.7, dtype=torch.float64)
        mixture = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
        q = ColumnNormal(loc, scale, shared, mixture=mixture)
        same = ColumnNormal(loc + 1, 2 * scale, shared, mixture=mixture)
        equal = ColumnNormal(loc + 1, 2 * scale, shared, mixture=mixture.clone())
        found = [kl_divergence(q, p) for p in (same, equal)]
        torch.testing.assert_close(*found)
        torch.testing.assert_close(*[torch.autograd.grad(value.sum(), mixture)[0] for value in found])

    def test_divergence_of_independent_entries(self, law: ColumnNormal) -> None:
        q = dist.Normal(torch.randn_like(law.loc), torch.rand_like(law.loc) + 0.2)
        rows = torch.distributions.MultivariateNormal(q.loc, q.scale.square().diag_embed())
        expected = kl_divergence(torch.distributions.Independent(rows, 1), multivariate(law))
        torch.testing.assert_close(kl_divergence(q.to_event(2), law), expected)
        torch.testing.assert_close(kl_divergence(q.to_event(3), law.to_event(1)), expected.sum())

    def test_expand(self, law: ColumnNormal) -> None:
        expanded = law.expand((5, 2))
        value = expanded.sample()
        assert value.shape == (5, 2, 4, 3)
        torch.testing.assert_close(expanded.log_prob(value), law.log_prob(value))

    def test_two_factors_are_refused(self) -> None:
        with pytest.raises(ValueError, match="not both"):
            ColumnNormal(torch.zeros(2, 3), torch.ones(()), torch.eye(3), torch.eye(3))


class TestIsotropicNormal:
    def test_is_independent_normals(self) -> None:
        scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
        law = IsotropicNormal(scale, (3, 4))
        other = dist.Normal(torch.zeros(2, 3, 4, dtype=torch.float64), scale[:, None, None]).to_event(2)
        draws = law.rsample((DRAWS,))
        torch.testing.assert_close(law.log_prob(draws), other.log_prob(draws))
        torch.testing.assert_close(law.variance, other.variance)
        assert_mean(draws, law.mean)
        assert_mean(draws.square(), law.variance)
        assert law.support.check(draws).all()
        torch.testing.assert_close(law.expand((3, 2)).log_prob(draws[0]), law.log_prob(draws[0]).expand(3, 2))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["identity", "covariance", "precision"])
def test_laws_around_one_mean_diverge_as_laws_around_equal_means(kind: str, layers: int) -> None:
    torch.manual_seed(0)
    loc = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    narrow, wide = (torch.full((layers, 1, 1), scale, dtype=torch.float64, requires_grad=True) for scale in (0.5, 2.0))
    law = columns(kind, loc, narrow)
    factors = {"scale_tril": law.scale_tril, "precision_tril": law.precision_tril}
    one, equal = (kl_divergence(law, ColumnNormal(mean, wide, **factors)) for mean in (loc, loc.detach().clone()))
    assert torch.equal(one, equal) and bool((one > 1).all())
    for ours, theirs in zip(*(torch.autograd.grad(each.sum(), (narrow, wide)) for each in (one, equal)), strict=True):
        assert torch.equal(ours, theirs)
