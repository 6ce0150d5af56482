"""What all models of LoRA weights share: scales, centres and precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pyro import poutine
from torch.distributions import Normal

from bayeslora.errors import SettingError
from bayeslora.models import Gaussian, MonteCLoRA, WeightModel
from bayeslora.models.distributions import ColumnNormal, base_of
from bayeslora.sites import Site


def test_sigma0_is_relative_to_each_layer_and_absolute_at_zero(sites: tuple[Site, ...]) -> None:
    model = MonteCLoRA(sites="both", scale=0.5, zero_scale=0.07)
    found = model.sigma0(sites[0])
    torch.testing.assert_close(found[:, 0, 0], 0.5 * sites[0].initial.square().mean((1, 2)).sqrt())
    torch.testing.assert_close(model.sigma0(sites[1]), torch.full((3, 1, 1), 0.07, dtype=torch.float64))


def test_deviation_is_absolute_in_every_layer(sites: tuple[Site, ...]) -> None:
    model = MonteCLoRA(sites="both", deviation=0.3)
    for site in sites[:2]:
        torch.testing.assert_close(model.sigma0(site), torch.full((3, 1, 1), 0.3, dtype=torch.float64))
    with pytest.raises(SettingError, match="deviation should be greater than 0, found 0.0"):
        MonteCLoRA(deviation=0.0)


def test_centre(sites: tuple[Site, ...]) -> None:
    assert (MonteCLoRA(centre="zero").prior_mean(sites[0]) == 0).all()
    assert (MonteCLoRA().prior_mean(sites[0]) == sites[0].initial).all()


def test_priors_of_point_estimates_are_by_their_role(sites: tuple[Site, ...]) -> None:
    _, matrix, head = sites
    tensor = Site("tensor.x", "tensor", "tensor", torch.tensor([1.0, 2.0], dtype=torch.float64), ("x",))
    model = MonteCLoRA(weight_scale=0.3, head_scale=2.0)
    nodes = poutine.trace(model.sample).get_trace((*sites, tensor)).nodes
    zero = torch.zeros((), dtype=torch.float64)
    for site, centre, scale in ((matrix, zero, 0.3), (head, zero, 2.0), (tensor, tensor.initial, 0.3)):
        law, value = nodes[site.name]["fn"], nodes[site.name]["value"]
        torch.testing.assert_close(law.log_prob(value), Normal(centre, scale).log_prob(value).sum())


@pytest.mark.parametrize("model", [Gaussian(), MonteCLoRA(), MonteCLoRA(collapse=False)], ids=repr)
def test_learning_starts_where_it_is_told_to(model: WeightModel, sites: tuple[Site, ...]) -> None:
    given = tuple(replace(site, given=site.initial + 1) for site in sites)
    for weights in (model.weights(model.initial(given)), model.guide(given).mean()):
        for site in sites:
            torch.testing.assert_close(weights[site.name], site.initial + 1)


def test_the_laws_of_the_prior_are_known_without_a_change_of_the_generators(sites: tuple[Site, ...]) -> None:
    before = torch.random.get_rng_state()
    with poutine.trace() as outside:
        laws = MonteCLoRA(collapse=False).prior_laws(sites)
    assert torch.equal(torch.random.get_rng_state(), before) and not outside.trace.stochastic_nodes
    assert list(laws) == list(MonteCLoRA(collapse=False).initial(sites))
    plain, correlated = (base_of(model.prior_laws(sites)["linear_5x4.A"]) for model in (Gaussian(), MonteCLoRA()))
    assert isinstance(plain, ColumnNormal) and plain.independent_entries
    assert isinstance(correlated, ColumnNormal) and not correlated.independent_entries


def test_half_precision_regions_are_left(sites: tuple[Site, ...]) -> None:
    single = tuple(replace(site, initial=site.initial.float()) for site in sites)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = MonteCLoRA().sample(single).values()
    assert {value.dtype for value in values} == {torch.float32}


def test_the_law_of_a_point_that_is_first_asked_in_inference_mode_may_be_in_a_graph_later() -> None:
    site = Site("head.classifier.bias", "head", "head", torch.ones(11), ("classifier.bias",))
    model = Gaussian(head_scale=0.5)
    value = torch.linspace(-1, 1, 11, requires_grad=True)
    with torch.inference_mode():
        model._point_prior(site).log_prob(torch.zeros(11))
    found = model._point_prior(site).log_prob(value)
    torch.testing.assert_close(found, Normal(0, 0.5).log_prob(value).sum())
    (gradient,) = torch.autograd.grad(found, value)
    torch.testing.assert_close(gradient, -value.detach() / 0.25)
    assert model._point_prior(site) is model._point_prior(site)
