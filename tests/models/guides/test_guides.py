"""Guides of every kind: densities, parameters in modules alone, copies, states, and the messages of misuse."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scenarios import tiny_program, tiny_rows

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import fit
from bayeslora.models import Gaussian, Guide, MonteCLoRA, ScalaBL, WeightModel, make_guide
from bayeslora.models.guides.auto import GUIDES, SUITABLE, guide_settings
from bayeslora.models.guides.base import PointGuide
from bayeslora.settings import Count, Settings
from bayeslora.sites import Site

A, B, HEAD = "linear_5x4.A", "linear_5x4.B", "head.classifier.weight"
WITH_DENSITY = ["structured", "mean-field", "low-rank", "full", "AutoDiagonalNormal"]
WITHOUT = ["delta"]
MODELS = [MonteCLoRA(), MonteCLoRA(collapse=False, wishart_on="precision"), Gaussian(sites="both"), ScalaBL()]


def loss(model: WeightModel, guide: Guide, sites: tuple[Site, ...], bound=Trace_ELBO) -> torch.Tensor:
    return bound().differentiable_loss(partial(model.sample, sites), guide)


@pytest.mark.parametrize("model", MODELS, ids=repr)
@pytest.mark.parametrize("kind", WITH_DENSITY + WITHOUT)
class TestEveryKind:
    def test_trains_copies_saves_and_moves(self, kind: str, model: WeightModel, sites: tuple[Site, ...]) -> None:
        guide = make_guide(kind, model, sites, init_scale=0.05)
        parameters = {name: value for name, value in guide.named_parameters() if value.requires_grad}
        starts = [site.initial.clone() for site in sites]
        optimiser = torch.optim.Adam(parameters.values(), lr=0.01)
        for _ in range(2):
            optimiser.zero_grad()
            loss(model, guide, sites).backward()
            assert all(value.grad is not None for value in parameters.values())
            optimiser.step()
        assert len(pyro.get_param_store()) == 0
        for site, before in zip(sites, starts, strict=True):
            assert torch.equal(site.initial, before)
        # Training has kept the parameters that the optimiser holds.
        after = dict(guide.named_parameters())
        assert all(after[name] is value for name, value in parameters.items())

        groups = guide.parameter_groups()
        grouped = [id(value) for values in groups.values() for value in values]
        assert sorted(grouped) == sorted(id(value) for value in parameters.values())
        assert groups["location" if kind != "delta" else "point"]

        fresh = make_guide(kind, model, sites, init_scale=0.05)
        fresh.load_state_dict(guide.state_dict())
        for other in (deepcopy(guide), fresh, deepcopy(deepcopy(guide))):
            torch.manual_seed(4)
            expected = guide()
            torch.manual_seed(4)
            torch.testing.assert_close(other(), expected)
            assert set(expected) == set(model.initial(sites))

        single = deepcopy(guide).to(torch.float32)
        assert {value.dtype for value in single().values()} == {torch.float32}
        assert {value.dtype for value in guide().values()} == {torch.float64}

    def test_starts_at_the_initial_weights(self, kind: str, model: WeightModel, sites: tuple[Site, ...]) -> None:
        guide = make_guide(kind, model, sites, init_scale=0.05)
        mean = guide.mean()
        assert set(mean) == {site.name for site in sites}
        for site in sites:
            torch.testing.assert_close(mean[site.name], site.initial)
            assert not mean[site.name].requires_grad


@pytest.mark.parametrize("model", MODELS, ids=repr)
@pytest.mark.parametrize("kind", WITH_DENSITY)
def test_density_is_that_of_the_trace(kind: str, model: WeightModel, sites: tuple[Site, ...]) -> None:
    guide = make_guide(kind, model, sites, init_scale=0.3)
    trace = poutine.trace(guide).get_trace()
    # For an autoguide the trace holds the unconstrained draw and the Jacobian; Deltas of points add zero.
    values = {name: trace.nodes[name]["value"] for name in model.initial(sites)}
    torch.testing.assert_close(guide.log_prob(values), torch.as_tensor(trace.log_prob_sum()))


@pytest.mark.parametrize("kind", WITH_DENSITY)
def test_a_density_needs_every_site(kind: str, sites: tuple[Site, ...]) -> None:
    guide = make_guide(kind, MonteCLoRA(), sites)
    with pytest.raises(PosteriorError, match=r"needs a value of 'linear_5x4.A.scale_tril'"):
        guide.log_prob({A: sites[0].initial})


@pytest.mark.parametrize("kind", WITHOUT)
def test_guides_without_a_density_say_so(kind: str, sites: tuple[Site, ...]) -> None:
    guide = make_guide(kind, MonteCLoRA(), sites)
    with pytest.raises(PosteriorError, match="no density|density of Auto.* is not available"):
        guide.log_prob(guide())


def test_a_flow_trains_averages_and_says_what_it_lacks(sites: tuple[Site, ...]) -> None:
    model = MonteCLoRA()
    guide = make_guide("AutoIAFNormal", model, sites)
    loss(model, guide, sites).backward()
    assert all(value.grad is not None for value in guide.parameters())
    one, two = guide.mean(), guide.mean()
    assert set(one) == {site.name for site in model.split(sites)[0]} | {site.name for site in model.split(sites)[1]}
    for name, value in one.items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, two[name])
    with pytest.raises(PosteriorError, match="density of AutoIAFNormal is not available"):
        guide.log_prob(guide())


def test_mean_field_bound_counts_the_jacobian_of_constrained_sites(sites: tuple[Site, ...]) -> None:
    """With a Delta's log-density left out, the closed bound of an autoguide would miss the Jacobian."""
    model = MonteCLoRA()
    guide = make_guide("mean-field", model, sites, init_scale=0.3)
    found = []
    for bound in (Trace_ELBO, TraceMeanField_ELBO):
        torch.manual_seed(5)
        found.append(loss(model, guide, sites, bound))
    torch.testing.assert_close(*found)


def test_delta_is_maximum_a_posteriori(sites: tuple[Site, ...]) -> None:
    model = Gaussian(centre="init", weight_scale=0.5)
    guide = make_guide("delta", model, sites)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        loss(model, guide, sites).backward()
        optimiser.step()
    mean = guide.mean()
    torch.testing.assert_close(mean[A], sites[0].initial, atol=1e-3, rtol=0)
    torch.testing.assert_close(mean[HEAD], torch.zeros_like(mean[HEAD]), atol=1e-3, rtol=0)


def test_delta_keeps_hyper_sites_where_they_start(sites: tuple[Site, ...]) -> None:
    # The joint density of columns and their covariance has no bound.
    model = MonteCLoRA()
    guide = make_guide("delta", model, sites)
    groups = guide.parameter_groups()
    assert {name: len(values) for name, values in groups.items()} == {"location": 1, "point": 2}
    loss(model, guide, sites).backward()
    assert {name for name, value in guide.named_parameters() if value.grad is None} == {
        "parts.0.points.linear_5x4/A/scale_tril",
        "parts.0.points.linear_5x4/A/mixture",
    }


def test_hyper_sites_of_autoguides_are_in_the_scale_group(sites: tuple[Site, ...]) -> None:
    groups = make_guide("mean-field", MonteCLoRA(), sites).parameter_groups()
    # The location of A; locations of two hyper-sites and three scales; B and the head.
    assert {name: len(values) for name, values in groups.items()} == {"location": 1, "scale": 5, "point": 2}


def test_making_a_guide_leaves_the_random_state_alone(sites: tuple[Site, ...]) -> None:
    before = torch.get_rng_state()
    for kind in ("structured", "mean-field", "delta"):
        make_guide(kind, MonteCLoRA(), sites)
    assert torch.equal(before, torch.get_rng_state())


def test_a_covariance_that_does_not_fit_into_memory_is_an_error() -> None:
    large = Site("linear.A", "A", "linear", torch.ones(1, 500_000, 4), ("layer",))  # 16 TB of covariance
    with pytest.raises(SettingError, match="AutoMultivariateNormal cannot guide this model: .*memory"):
        make_guide("full", Gaussian(), (large,))


def test_a_guide_is_made_of_its_settings_if_it_has_any(
    sites: tuple[Site, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(PointGuide):
        def __init__(self, model: WeightModel, sites: tuple[Site, ...]) -> None:
            super().__init__({site.name: site.initial for site in sites})

    @dataclass(frozen=True)
    class Numbers(Settings):
        name = "set"
        number: Count = 3

    class Set(Plain):
        settings = Numbers

        def __init__(self, model: WeightModel, sites: tuple[Site, ...], settings: Numbers) -> None:
            super().__init__(model, sites)
            self.number = settings.number

    monkeypatch.setattr(GUIDES, "_homes", {"plain": Plain, "set": Set})
    model = Gaussian()
    assert type(make_guide("plain", model, sites).parts[0]) is Plain and guide_settings("plain", {}) == {}
    numbers = [make_guide("set", model, sites, settings=each).parts[0].number for each in (None, {"number": "4"})]
    assert numbers == [3, 4] and guide_settings("set", {}) == {"number": 3}
    for kind in ("plain", "structured", "mean-field", "delta"):
        with pytest.raises(SettingError, match=f"guide='{kind}' has no settings, found n. Guides with settings: set."):
            make_guide(kind, model, sites, settings={"n": 1})
    with pytest.raises(SettingError, match="Unknown setting of set 'nmber'. Did you mean 'number'"):
        make_guide("set", model, sites, settings={"nmber": 1})
    with pytest.raises(SettingError, match="set: number should be greater than or equal to 1, found '0'"):
        guide_settings("set", {"number": "0"})


@pytest.mark.parametrize("kind", SUITABLE)
def test_every_guide_of_pyro_that_is_offered_is_fitted(kind: str) -> None:
    posterior = fit(tiny_program(MonteCLoRA(components=2)), tiny_rows(8), guide=kind, epochs=1, progress=False)
    draws = posterior.sample(2)["linear_16x16.A"]
    assert bool(draws.isfinite().all()) and not torch.equal(draws[0], draws[1])


def test_unknown_and_unfit_kinds(sites: tuple[Site, ...]) -> None:
    with pytest.raises(SettingError, match="Did you mean 'mean-field'"):
        make_guide("meanfield", MonteCLoRA(), sites)
    with pytest.raises(SettingError, match=r"AutoCallable cannot guide this model\.$"):
        make_guide("AutoCallable", MonteCLoRA(), sites)
    with pytest.raises(SettingError, match="AutoGaussian cannot guide this model. .*guide='full'"):
        make_guide("AutoGaussian", MonteCLoRA(), sites)
    with pytest.raises(SettingError, match="AutoDelta cannot guide this model. .*guide='delta'"):
        make_guide("AutoDelta", MonteCLoRA(), sites)
