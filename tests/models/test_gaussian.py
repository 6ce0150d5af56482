"""Isotropic Gaussian LoRA: prior, guide granularities, divergences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import Independent, Normal, kl_divergence

from bayeslora.errors import SettingError
from bayeslora.models import Gaussian
from bayeslora.sites import Site

A, B = "linear_5x4.A", "linear_5x4.B"
NOISE = {"rank": (3, 1, 2), "layer": (3, 1, 1), "entry": (3, 5, 2)}


@pytest.mark.parametrize("centre", ["init", "zero"])
def test_prior_density_is_that_of_independent_normals(centre: str, sites: tuple[Site, ...]) -> None:
    model = Gaussian(sites="both", centre=centre, scale=0.7, head_scale=2.0)
    trace = poutine.trace(model.sample).get_trace(sites)
    trace.compute_log_prob()
    for site in sites:
        centre, scale = (0.0, 2.0) if site.role == "head" else (model.prior_mean(site), model.sigma0(site))
        value = trace.nodes[site.name]["value"]
        expected = Normal(torch.as_tensor(centre, dtype=torch.float64), scale).log_prob(value).sum()
        torch.testing.assert_close(trace.nodes[site.name]["log_prob_sum"], expected)
    assert model.stochastic(sites) == {A, B}
    assert list(model.initial(sites)) == [site.name for site in sites]


@pytest.mark.parametrize(("noise", "shape"), NOISE.items())
def test_guide_learns_a_scale_of_each_granularity(noise: str, shape: tuple, sites: tuple[Site, ...]) -> None:
    model = Gaussian(noise=noise, eps=0.3)
    guide = model.guide(sites)
    part = guide.parts[0]
    torch.testing.assert_close(part.log_eps.exp(), torch.full(shape, 0.3, dtype=torch.float64))
    with torch.no_grad():
        part.log_eps.add_(0.3 * torch.randn(shape, dtype=torch.float64))
        part.mu.add_(0.1)
    q = poutine.trace(guide).get_trace()
    p = poutine.trace(poutine.replay(partial(model.sample, sites), trace=q)).get_trace()
    normal = Normal(part.mu, (part.sigma0 * part.log_eps.exp()).expand_as(part.mu))
    prior = Normal(sites[0].initial, model.sigma0(sites[0]).expand_as(part.mu))
    torch.testing.assert_close(
        kl_divergence(q.nodes[A]["fn"], p.nodes[A]["fn"]),
        kl_divergence(Independent(normal, 3), Independent(prior, 3)),
    )
    torch.testing.assert_close(
        guide.log_prob({A: q.nodes[A]["value"]} | dict.fromkeys((B, sites[2].name), part.mu)),
        normal.log_prob(q.nodes[A]["value"]).sum(),
    )
    groups = guide.parameter_groups()
    assert [id(value) for value in groups["scale"]] == [id(part.log_eps)]
    assert [id(value) for value in groups["location"]] == [id(part.mu)]
    assert len(groups["point"]) == 2

    TraceMeanField_ELBO().differentiable_loss(partial(model.sample, sites), guide).backward()
    assert (part.log_eps.grad != 0).all()


def test_unknown_noise_is_refused() -> None:
    with pytest.raises(SettingError, match="noise should be 'rank', 'layer' or 'entry', found 'column'"):
        Gaussian(noise="column")


@pytest.mark.parametrize("name", ["scale", "zero_scale", "eps", "weight_scale", "head_scale", "deviation"])
def test_a_prior_too_wide_for_single_precision_is_refused(name: str) -> None:
    with pytest.raises(SettingError, match=rf"gaussian: {name} should be less than 1000000000000000, found 1e\+30"):
        Gaussian(**{name: 1e30})
