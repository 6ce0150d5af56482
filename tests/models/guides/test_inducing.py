"""The guide of inducing matrices: parameters, starts, limits, the exact posterior, and what it refuses."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scenarios import Regression, lora_regression
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.models import Gaussian, Guide, MonteCLoRA, WeightModel, make_guide
from bayeslora.models.distributions import ColumnNormal
from bayeslora.models.guides.inducing import FlowGuide, InducingGuide, InducingSettings, _orthonormal
from bayeslora.models.guides.inducing_laws import AugmentedNormal, DrawnNormal, InducedNormal
from bayeslora.sites import Site

A, B = "linear_5x4.A", "linear_5x4.B"
#: Inducing values as many as neither side has, as both have, and more than the smaller side has.
SETTINGS: list[dict[str, Any]] = [{}, {"m": 1}, {"m": 3, "bound": "augmented"}, {"m": 3, "flow": 6, "lam": 0.5}]


def inducing(model: WeightModel, sites: tuple[Site, ...], **settings: Any) -> Guide:
    return make_guide("inducing", model, sites, settings=settings)


def parts(guide: Guide) -> list[InducingGuide]:
    return list(guide.parts[0].parts)


def moved(guide: Guide) -> Guide:
    """With all parameters away from their start."""
    with torch.no_grad():
        for value in guide.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return guide


def loss(model: WeightModel, guide: Guide, sites: tuple[Site, ...], bound: Any = Trace_ELBO) -> Tensor:
    found: Tensor = bound().differentiable_loss(partial(model.sample, sites), guide)
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_it_trains_copies_saves_and_moves(settings: dict[str, Any], sites: tuple[Site, ...]) -> None:
    model = Gaussian(sites="both")
    guide = moved(inducing(model, sites, **settings))
    for bound in (Trace_ELBO, TraceMeanField_ELBO):
        guide.zero_grad()
        loss(model, guide, sites, bound).backward()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in guide.parameters())
    grouped = [id(value) for values in guide.parameter_groups().values() for value in values]
    assert sorted(grouped) == sorted(id(value) for value in guide.parameters())
    fresh = inducing(model, sites, **settings)
    fresh.load_state_dict(guide.state_dict())
    for other in (deepcopy(guide), fresh):
        torch.manual_seed(4)
        expected = guide()
        torch.manual_seed(4)
        torch.testing.assert_close(other(), expected)
        torch.testing.assert_close(other.mean(), guide.mean())
    single = deepcopy(guide).to(torch.float32)
    assert {value.dtype for value in (single() | single.mean()).values()} == {torch.float32}


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_it_starts_where_lora_does(settings: dict[str, Any], sites: tuple[Site, ...]) -> None:
    guide = inducing(Gaussian(sites="both"), sites, **(settings | {"sd": 1e-6, "lam": 1e-6}))
    for found in (guide.mean(), guide()):  # and without noise it is LoRA
        for site in sites:
            torch.testing.assert_close(found[site.name], site.initial, rtol=0, atol=1e-5)


def test_a_rank_above_both_sides_and_more_inducing_values_than_either_has(make_sites: Any) -> None:
    model, sites = Gaussian(sites="both"), make_sites(rank=7)
    guide = moved(inducing(model, sites))
    assert [tuple(part.inducing_mean.shape) for part in parts(guide)] == [(3, 5, 7), (3, 4, 7)]
    for part, site in zip(parts(guide), sites[:2], strict=True):
        law, prior = part.marginal(), ColumnNormal(model.prior_mean(site), model.sigma0(site))
        draws = law.rsample((4000,))
        ratios = law.log_prob(draws) - prior.log_prob(draws)
        # Four standard errors of a mean of 4,000 draws, in each of three layers.
        assert ((ratios.mean(0) - kl_divergence(law, prior)).abs() < 4 * ratios.std(0) / 4000**0.5).all()


def test_it_starts_at_a_given_adapter(sites: tuple[Site, ...]) -> None:
    given = torch.ones_like(sites[1].initial)
    site = Site(B, "B", "linear_5x4", sites[1].initial, sites[1].layers, given=given)
    guide = inducing(Gaussian(sites="both"), (site,))
    assert torch.equal(guide.mean()[B], given)


def test_at_its_start_it_is_the_prior(sites: tuple[Site, ...]) -> None:
    model, values = Gaussian(sites="both"), {name: torch.randn_like(guide) for name, guide in by_name(sites).items()}
    guide = inducing(model, sites)
    trace = poutine.trace(poutine.condition(partial(model.sample, sites), data=values)).get_trace()
    expected = trace.nodes[A]["fn"].log_prob(values[A]) + trace.nodes[B]["fn"].log_prob(values[B])
    torch.testing.assert_close(guide.log_prob(values), expected.double())


def by_name(sites: tuple[Site, ...]) -> dict[str, Tensor]:
    return {site.name: site.initial for site in sites}


def test_which_law_it_has(sites: tuple[Site, ...]) -> None:
    laws = []
    for settings in SETTINGS:
        guide = inducing(Gaussian(), sites, **settings)
        laws.append(type(poutine.trace(guide).get_trace().nodes[A]["fn"].base_dist))
        (part,) = parts(guide)
        assert part.inducing_mean.shape == (3, min(settings.get("m", 9), 5), min(settings.get("m", 9), 2))
        assert set(part.noise_scales()) == {f"{A}.lam", f"{A}.sd"}
    assert laws == [InducedNormal, InducedNormal, AugmentedNormal, DrawnNormal]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_the_density_is_that_of_the_trace(settings: dict[str, Any], sites: tuple[Site, ...]) -> None:
    guide = moved(inducing(Gaussian(sites="both"), sites, **settings))
    torch.manual_seed(1)
    trace = poutine.trace(guide).get_trace()
    torch.manual_seed(1)
    values = guide.draw()
    assert guide.dense and values.keys() == {*guide.latents, *guide.auxiliary}
    assert all(torch.equal(values[name], trace.nodes[name]["value"]) for name in (A, B))
    torch.testing.assert_close(guide.log_prob(values), torch.as_tensor(trace.log_prob_sum()))


def test_with_a_flow_the_density_is_known_with_what_the_flow_starts_from_alone(sites: tuple[Site, ...]) -> None:
    guide = inducing(Gaussian(sites="both"), sites, m=3, flow=6)
    assert guide.auxiliary == (f"{A}.base", f"{B}.base") and inducing(Gaussian(), sites).auxiliary == ()
    with pytest.raises(PosteriorError, match=r"The density needs a value of 'linear_5x4.A.base' \(1 sites missing\)"):
        guide.log_prob({A: sites[0].initial, B: sites[1].initial})


def test_layers_have_flows_of_their_own_which_are_autoregressive(sites: tuple[Site, ...]) -> None:
    (part,) = parts(moved(inducing(Gaussian(), sites, m=3, flow=64)))  # so many that some are awake
    net = part.flow.net
    start = torch.randn(3, 2, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: torch.stack(net(x)), start)
    depends = (jacobian.abs() > 0).any(0)  # (layers, k_r, k_c) on (layers, k_r, k_c)
    before = torch.ones(3, 3).tril(-1).bool()
    for layer in range(3):
        for row in range(2):
            assert torch.equal(depends[layer, row, :, layer, row], before)
    assert depends.sum() == 3 * 2 * before.sum()  # nothing of another layer or row
    # The density of values is that of where they come from over the Jacobian's determinant.
    sd = torch.full((3, 3, 2), 0.5, dtype=torch.float64)
    torch.manual_seed(2)
    base = sd * torch.randn_like(sd)
    values, log_det = part.flow(base)
    shift, log_scale = net(base.mT)
    torch.testing.assert_close(values, (base.mT * log_scale.exp() + shift).mT)
    torch.testing.assert_close(log_det, log_scale.sum((-2, -1)))


def test_the_mean_of_a_flow_is_that_of_its_draws(sites: tuple[Site, ...]) -> None:
    guide = moved(inducing(Gaussian(), sites, m=3, flow=6, sd=0.5, lam=0.1, explained=0.5))
    with torch.no_grad():
        parts(guide)[0].inducing_mean.add_(3)
    state = torch.get_rng_state()
    mean = guide.mean()[A]
    assert torch.equal(torch.get_rng_state(), state)
    draws = torch.stack([guide()[A].detach() for _ in range(200)])
    error = (draws.var(0) * (1 / 200 + 1 / 256)).sqrt()
    # Of the 30 entries' errors the largest is below four standard ones.
    assert ((draws.mean(0) - mean).abs() / error).max() < 4


def test_the_best_of_the_family_is_the_exact_posterior_where_all_directions_have_inducing_values() -> None:
    """With B fixed the precision of the columns is a Kronecker product: it is diagonal in frames of both sides."""
    known = lora_regression(noise=2.0)
    exact = MultivariateNormal(known.mean, known.covariance)
    (site,) = known.program.model.split(known.program.sites)[0]
    guide = parts(inducing(known.program.model, (site,)))[0].double()

    def divergence() -> Tensor:
        law = guide.marginal()
        frame = torch.kron(law.frames.columns[0], law.frames.rank[0])
        covariance = law.scale[0, 0, 0] ** 2 * frame * law.block_variance.flatten() @ frame.mT
        return kl_divergence(MultivariateNormal(law.mean.flatten(), covariance), exact)

    def step() -> Tensor:
        guide.zero_grad()
        found = divergence()
        found.backward()
        return found

    assert divergence() > 1
    learned = [value for value in guide.parameters() if value is not guide.log_lam]  # there are no other directions
    torch.optim.LBFGS(learned, max_iter=200, line_search_fn="strong_wolfe").step(step)
    assert divergence() < 1e-4
    value = torch.randn(1, 3, 2, dtype=torch.float64)
    # What is left of the divergence is a hundredth of a deviation in each of six directions.
    torch.testing.assert_close(guide.marginal().log_prob(value)[0], exact.log_prob(value.flatten()), rtol=0, atol=0.1)


def near_the_posterior(known: Regression, **settings: Any) -> InducingGuide:
    """With the exact mean, and the same frames whatever the settings are."""
    (site,) = known.program.model.split(known.program.sites)[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"m": 3, "sd": 0.9, "lam": 0.9, "explained": 0.7} | settings
        guide = parts(inducing(known.program.model, (site,), **settings))[0].double()
    with torch.no_grad():
        guide.mu.copy_(known.mean.reshape(guide.mu.shape))
        guide.inducing_mean.copy_(0.1 * torch.arange(6.0).reshape(guide.inducing_mean.shape))
    return guide


def drawn(guide: FlowGuide, n: int) -> tuple[Tensor, Tensor]:
    """Matrices (n, 1, columns, rank), and what stands for their log density (n,)."""
    law = guide.given(guide.base().sample((n,)))
    values = law.rsample()
    return values, law.log_prob(values).squeeze(1)


@pytest.mark.parametrize("far", [0.0, 0.2])
def test_with_a_flow_ratios_have_the_evidence_for_their_mean_and_vary_more(far: float) -> None:
    torch.manual_seed(0)
    known = lora_regression(noise=4.0)
    exact = MultivariateNormal(known.mean, known.covariance)
    guide, plain = near_the_posterior(known, flow=6), near_the_posterior(known)
    with torch.no_grad():
        for value in guide.flow.parameters():  # of which the identity is the start
            value.add_(far * torch.randn_like(value))
        values, density = drawn(guide, 20_000)
        log_p = exact.log_prob(values.flatten(1))  # and the evidence, which is left out of both sides
        ratios = (log_p - density).exp()
        # Four standard errors of a mean of 20,000 draws.
        assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / 20_000**0.5 < 0.1
        if far == 0:
            of_weights = (log_p - plain.marginal().log_prob(values).squeeze(1)).exp()
            assert abs(float(of_weights.mean()) - 1) < 4 * float(of_weights.std()) / 20_000**0.5 < 0.1
            assert ratios.std() > 1.05 * of_weights.std()


def test_given_the_matrix_the_mean_ratio_is_that_of_the_matrix_alone() -> None:
    torch.manual_seed(0)
    known = lora_regression(noise=4.0)
    guide, plain = near_the_posterior(known, flow=6), near_the_posterior(known)
    with torch.no_grad():
        value = plain.marginal().sample()
        frames, lam, sd = plain.frames(), plain.log_lam.exp(), plain.log_sd.exp()
        block = frames.block((value - plain.mu) / plain.scale)
        # By Bayes' rule, q(U | W) in the frames, where the flow is the identity.
        weight = frames.explained / (lam.square() * (1 - frames.explained))
        variance = 1 / (1 / sd.square() + weight)
        mean = variance * (plain.inducing_mean / sd.square() + weight * block / frames.explained.sqrt())
        base = torch.distributions.Normal(mean, variance.sqrt()).sample((20_000,))
        ratios = (plain.marginal().log_prob(value) - guide.given(base).log_prob(value)).squeeze(1).exp()
    # Four standard errors of a mean of 20,000 draws.
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / 20_000**0.5 < 0.1


def test_frames_are_orthonormal_however_skew_the_directions_are() -> None:
    directions = torch.randn(3, 50, 8)
    directions[..., 1] = directions[..., 0] + 1e-2 * directions[..., 1]
    frame = _orthonormal(directions)
    torch.testing.assert_close(frame.mT @ frame, torch.eye(8).expand(3, 8, 8), rtol=0, atol=1e-5)
    projected = frame @ (frame.mT @ directions)
    torch.testing.assert_close(projected, directions, rtol=0, atol=1e-4)  # of the same space


def test_making_it_leaves_the_random_state_alone_and_the_seed_counts(sites: tuple[Site, ...]) -> None:
    before = torch.get_rng_state()
    one, same = (parts(inducing(Gaussian(), sites))[0].columns for _ in range(2))
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(one, same)
    torch.manual_seed(1)
    assert not torch.equal(one, parts(inducing(Gaussian(), sites))[0].columns)
    assert len(pyro.get_param_store()) == 0


def test_other_priors_and_too_narrow_flows_are_refused(sites: tuple[Site, ...]) -> None:
    with pytest.raises(SettingError, match="those of 'monteclora' are not. Choose that model, or guide='structured'"):
        inducing(MonteCLoRA(), sites)
    with pytest.raises(SettingError, match="flow needs at least as many hidden units as there are values, m=9"):
        InducingSettings(flow=8)
    with pytest.raises(SettingError, match="inducing: explained should be less than 1"):
        inducing(Gaussian(), sites, explained=1)
