"""Laws of inducing values against brute-force conditioning of the joint normal law, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from bayeslora.models.distributions import ColumnNormal
from bayeslora.models.guides.inducing_laws import AugmentedNormal, DrawnNormal, Frames, InducedNormal
from bayeslora.models.wishart import WishartCholesky

#: Columns, rank, and inducing inputs of either side: fewer than the side has entries, as many, and more; the rank is
#: that of no side, or larger.
SIZES = [(5, 3, 2, 2), (4, 2, 4, 2), (4, 2, 3, 5), (3, 1, 2, 4), (2, 4, 3, 3)]
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


def side(entries: int, inputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one side: covariance of entries and inducing rows, L P of the singular value decomposition, s and V."""
    z, d = normal(inputs, entries), torch.rand(inputs, dtype=torch.float64) + 0.5
    kernel = z @ z.mT + (d.square()).diag()
    root = torch.linalg.cholesky(kernel)
    left, singular, right = torch.linalg.svd(torch.linalg.solve_triangular(root, z, upper=False), full_matrices=False)
    rows = torch.cat([torch.cat([torch.eye(entries, dtype=z.dtype), z.mT], 1), torch.cat([z, kernel], 1)])
    return rows, root @ left, singular.square(), right.mT


class Joint:
    """W~ and U as Ritter et al. have them: one matrix normal law, of which blocks are conditioned on by brute force."""

    def __init__(self, columns: int, rank: int, of_columns: int, of_rank: int) -> None:
        (s_c, left_c, s, v_c), (s_r, left_r, t, v_r) = side(columns, of_columns), side(rank, of_rank)
        whole = torch.kron(s_c, s_r)  # of the rows, one after another
        place = torch.arange(len(whole)).reshape(len(s_c), len(s_r))
        w, u = place[:columns, :rank].flatten(), place[columns:, rank:].flatten()
        # U of the spectral form to theirs: all of it that the matrix depends on.
        turn = torch.kron(left_c, left_r)
        gain = whole[w][:, u] @ torch.linalg.inv(whole[u][:, u])
        self.mean_map = gain @ turn
        self.covariance = whole[w][:, w] - gain @ whole[u][:, w]
        self.frames = Frames(v_c, v_r, s.unsqueeze(-1) * t)
        self.block = (len(s), len(t))


def covariance_of(law: InducedNormal) -> Tensor:
    """Of the sampler: from what it makes of each entry of its noise."""
    entries = law.entries
    units = torch.eye(entries, dtype=torch.float64).reshape(entries, *law.event_shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: units)
        moves = (law.rsample((entries,)) - law.mean).flatten(1)
    return moves.mT @ moves


def case(
    sizes: tuple[int, int, int, int], kind: type[InducedNormal] = InducedNormal
) -> tuple[Joint, InducedNormal, Tensor, Tensor]:
    """A law with all of its parameters away from where they start, and by brute force its mean and covariance."""
    torch.manual_seed(sum(sizes))
    joint = Joint(*sizes)
    m, sd, lam, scale = normal(*joint.block), torch.rand(joint.block).double() + 0.2, 0.3, 1.7
    loc = normal(*sizes[:2])
    law = kind(loc, number(scale), joint.frames, m, sd, number(lam))
    mean = loc.flatten() + scale * joint.mean_map @ m.flatten()
    noise = joint.mean_map @ sd.flatten().square().diag() @ joint.mean_map.mT
    return joint, law, mean, scale**2 * (noise + lam**2 * joint.covariance)


@pytest.mark.parametrize("sizes", SIZES)
def test_given_inducing_values_it_is_the_conditional_law(sizes: tuple[int, int, int, int]) -> None:
    torch.manual_seed(sum(sizes))
    joint = Joint(*sizes)
    drawn, one = normal(*joint.block), number(1)
    law = DrawnNormal(torch.zeros(sizes[:2]).double(), one, joint.frames, drawn, torch.zeros(()), one)
    torch.testing.assert_close(law.mean.flatten(), joint.mean_map @ drawn.flatten(), **EXACT)
    torch.testing.assert_close(covariance_of(law), joint.covariance, **EXACT)
    # Integrated over p(U), the prior of W is left as it is.
    whole = joint.mean_map @ joint.mean_map.mT + joint.covariance
    torch.testing.assert_close(whole, torch.eye(len(whole), dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("sizes", SIZES)
def test_moments_density_and_divergence_by_brute_force(sizes: tuple[int, int, int, int]) -> None:
    _, law, mean, covariance = case(sizes)
    torch.testing.assert_close(law.mean.flatten(), mean, **EXACT)
    torch.testing.assert_close(covariance_of(law), covariance, **EXACT)
    torch.testing.assert_close(law.variance.flatten(), covariance.diagonal(), **EXACT)
    exact, value = MultivariateNormal(mean, covariance), normal(3, *sizes[:2])
    torch.testing.assert_close(law.log_prob(value), exact.log_prob(value.flatten(1)), **EXACT)
    for scale in (1.7, 0.6):  # of a prior as wide as that of the inducing values, and of another
        prior = ColumnNormal(normal(*sizes[:2]), number(scale))
        wide = MultivariateNormal(prior.loc.flatten(), scale**2 * torch.eye(len(mean), dtype=torch.float64))
        torch.testing.assert_close(kl_divergence(law, prior), kl_divergence(exact, wide), **EXACT)


def test_the_divergence_is_that_of_monte_carlo() -> None:
    _, law, _, _ = case(SIZES[0])
    prior = ColumnNormal(normal(5, 3), number(1.7))
    draws = law.rsample((20_000,))
    ratios = law.log_prob(draws) - prior.log_prob(draws)
    # Four standard errors of a mean of 20,000 draws.
    assert abs(float(ratios.mean() - kl_divergence(law, prior))) < 4 * float(ratios.std()) / math.sqrt(20_000)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_augmented_bound_is_the_divergence_of_both_jointly(sizes: tuple[int, int, int, int]) -> None:
    joint, law, mean, covariance = case(sizes, AugmentedNormal)
    scale, gain = 1.7, joint.mean_map * 1.7
    prior = ColumnNormal(normal(*sizes[:2]), number(scale))
    noise = law.deviation.flatten().square().diag()
    q = MultivariateNormal(
        torch.cat([mean, law.inducing_mean.flatten()]),
        torch.cat([torch.cat([covariance, gain @ noise], 1), torch.cat([noise @ gain.mT, noise], 1)]),
    )
    # p(U | W) is of the noise around the offset; where that is the prior's mean, p(U) is N(0, 1).
    back = joint.mean_map.mT / scale
    shift = back @ (prior.loc - law.loc).flatten()
    whole, ones = scale**2 * torch.eye(len(mean)).double(), torch.eye(len(shift)).double()
    p = MultivariateNormal(
        torch.cat([prior.loc.flatten(), shift]),
        torch.cat([torch.cat([whole, gain], 1), torch.cat([gain.mT, ones], 1)]),
    )
    torch.testing.assert_close(kl_divergence(law, prior), kl_divergence(q, p), **EXACT)


def test_the_augmented_bound_is_never_below_the_marginal_one_and_is_it_at_the_prior() -> None:
    for seed in range(100):
        torch.manual_seed(seed)
        frames = Frames(*(torch.linalg.qr(normal(n, 2)).Q for n in (4, 3)), torch.rand(2, 2).double())
        m, sd, lam = normal(2, 2), normal(2, 2).exp(), normal(1, 1).exp()
        parts = (normal(4, 3), number(1), frames, m, sd, lam)
        prior = ColumnNormal(normal(4, 3), number(1))
        marginal, augmented = (kl_divergence(kind(*parts), prior) for kind in (InducedNormal, AugmentedNormal))
        assert augmented >= marginal
    one = number(1)
    law = AugmentedNormal(prior.loc, one, frames, torch.zeros_like(m), torch.ones_like(sd), one)
    assert float(kl_divergence(law, prior)) == pytest.approx(0, abs=1e-12)


def test_inducing_values_that_were_drawn_estimate_the_augmented_bound() -> None:
    _, law, _, _ = case(SIZES[0], AugmentedNormal)
    prior = ColumnNormal(normal(5, 3), number(1.7))
    base = torch.distributions.Normal(law.inducing_mean, law.deviation)
    drawn = base.sample((20_000,))
    density = base.log_prob(drawn).sum((-2, -1))
    found = DrawnNormal(law.loc, law.scale, law.frames, drawn, density, law.lam)
    estimates = kl_divergence(found, prior)
    # By draws of the matrix, too, as other bounds have it.
    value = found.rsample()
    for each in (estimates, found.log_prob(value) - prior.log_prob(value)):
        # Four standard errors of a mean of 20,000 draws.
        assert abs(float(each.mean() - kl_divergence(law, prior))) < 4 * float(each.std()) / math.sqrt(20_000)
    marginal = InducedNormal(law.loc, law.scale, law.frames, law.inducing_mean, law.deviation, law.lam)
    assert float((found.log_prob(value) - marginal.log_prob(value)).mean()) > 0  # above the density in the mean


def test_the_weight_of_a_conditional_draw_is_known_from_its_noise() -> None:
    """log p(W | U) - log q(W | U) = n r log lam + (1 - lam^2) / 2 |E|^2."""
    joint = Joint(5, 3, 2, 2)
    noise, lam, one = normal(5, 3), 0.3, number(1)
    parts = (torch.zeros(5, 3).double(), one, joint.frames, normal(2, 2), torch.zeros(2, 2).double())
    p, q = InducedNormal(*parts, one), InducedNormal(*parts, lam * one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: noise)
        value = q.rsample()
    expected = 15 * math.log(lam) + (1 - lam**2) / 2 * noise.square().sum()
    torch.testing.assert_close(p.log_prob(value) - q.log_prob(value), expected, **EXACT)


def test_without_noise_it_is_the_mean() -> None:
    joint, law, mean, _ = case(SIZES[0])
    narrow = InducedNormal(law.loc, law.scale, joint.frames, law.inducing_mean, law.deviation * 1e-9, law.lam * 1e-9)
    # Noise of 1e-9 times the scale, five deviations wide.
    torch.testing.assert_close(narrow.rsample((10,)).flatten(1), mean.expand(10, -1), rtol=0, atol=1e-8)


@pytest.mark.parametrize("make", [
    lambda loc, one: ColumnNormal(loc, one, scale_tril=torch.eye(3).double()),
    lambda loc, one: ColumnNormal(loc, one, precision_tril=torch.eye(3).double()),
    lambda loc, one: ColumnNormal(loc, one, mixture=torch.ones(2).double() / 2),
    lambda loc, one: WishartCholesky(4.0, torch.eye(3).double()),
])  # fmt: skip
def test_other_priors_have_no_closed_form(make: Callable[..., Any]) -> None:
    _, law, _, _ = case(SIZES[0])
    # By this exception `kl_divergence` says that a pair has no formula, upon which the bound takes a draw for an
    # estimate: a formula of another prior in its place would be wrong without a word.
    with pytest.raises(NotImplementedError):
        kl_divergence(law, make(torch.zeros(5, 3).double(), number(1)))


@pytest.mark.parametrize("kind", [InducedNormal, AugmentedNormal, DrawnNormal])
def test_batches_expand_and_events(kind: type[InducedNormal]) -> None:
    frames = Frames(*(torch.linalg.qr(normal(4, n, 2)).Q for n in (5, 3)), torch.full((4, 2, 2), 0.5).double())
    third = torch.zeros(4).double() if kind is DrawnNormal else torch.ones(4, 2, 2).double()
    one = torch.ones(4, 1, 1, dtype=torch.float64)
    law = kind(normal(4, 5, 3), one, frames, normal(4, 2, 2), third, one)
    assert law.batch_shape == (4,) and law.log_prob(law.rsample()).shape == (4,)
    assert law.to_event(1).log_prob(law.rsample((6,))).shape == (6,)
    wider = law.expand((2, 4))
    torch.manual_seed(1)
    value = wider.rsample()
    assert type(wider) is kind and value.shape == (2, 4, 5, 3) and wider.support.check(value).all()
    torch.testing.assert_close(wider.log_prob(value), law.log_prob(value))
    with pytest.raises(ValueError, match="support"):
        kind(law.loc, one, frames, law.inducing_mean, third, one, validate_args=True).log_prob(value * math.nan)
