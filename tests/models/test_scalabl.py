"""ScalaBL: a product of points and random singular values, its prior and guide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pyro import poutine
from scenarios import Regression, linear_parts, lora_regression, text_program, text_rows, tiny_program, tiny_rows
from scenarios import saved_base as make_base
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import bayeslora as bl
from bayeslora.diagnostics.report import _of_khat
from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import fit
from bayeslora.models import ScalaBL, make_guide
from bayeslora.models.guides.base import Guide, GuideList
from bayeslora.models.scalabl import product
from bayeslora.sites import Site

A, B = "linear_5x4.A", "linear_5x4.B"
S, P, Q = f"{A}.singular_values", f"{A}.column_vectors", f"{A}.rank_vectors"


@pytest.mark.parametrize("rank", [2, 7])
def test_it_starts_at_the_initial_matrices(rank: int, make_sites) -> None:
    sites = make_sites(rank=rank)
    model = ScalaBL()
    initial = model.initial(sites)
    kept = min(rank, 5)
    assert {name: tuple(value.shape) for name, value in initial.items() if name.startswith(A)} == {
        S: (3, kept), P: (3, 5, kept), Q: (3, rank, kept)
    }  # fmt: skip
    for weights in (model.weights(initial), model.guide(sites).mean(), make_guide("delta", model, sites).mean()):
        assert weights.keys() == {site.name for site in sites}
        for site in sites:
            torch.testing.assert_close(weights[site.name], site.initial)
    assert model.stochastic(sites) == {S}
    given = replace(sites[0], given=sites[0].initial + 1)
    torch.testing.assert_close(model.site_guide(given).mean()[A], sites[0].initial + 1)


@pytest.mark.parametrize(("centre", "deviation"), [("init", None), ("zero", 0.3)])
def test_density_and_divergence_are_those_of_the_singular_values(
    centre: str, deviation: float | None, sites: tuple[Site, ...]
) -> None:
    model = ScalaBL(centre=centre, deviation=deviation, scale=2.0, eps=0.4)
    start = torch.linalg.svdvals(sites[0].initial)
    spread = start.square().mean(1, keepdim=True).sqrt() * 2 if deviation is None else torch.full_like(start, 0.3)
    prior = Normal(start if centre == "init" else torch.zeros_like(start), spread.expand_as(start))
    guide = model.guide(sites)
    part = guide.parts[0]
    with torch.no_grad():
        for value in guide.parameters():
            value.add_(0.1 * torch.randn_like(value))
    q = poutine.trace(guide).get_trace()
    p = poutine.trace(poutine.replay(partial(model.sample, sites), trace=q)).get_trace()
    values = q.nodes[S]["value"]
    torch.testing.assert_close(p.nodes[S]["fn"].log_prob(values), prior.log_prob(values).sum())
    posterior = Normal(part.mu, 0.4 * spread * (part.log_eps.exp() / 0.4))
    assert part.log_eps.shape == start.shape
    torch.testing.assert_close(kl_divergence(q.nodes[S]["fn"], p.nodes[S]["fn"]), kl_divergence(posterior, prior).sum())
    latents = {name: q.nodes[name]["value"] for name in q.stochastic_nodes}
    torch.testing.assert_close(guide.log_prob(latents), posterior.log_prob(values).sum())
    torch.testing.assert_close(p.nodes[A]["value"], product(q.nodes[P]["value"], values, q.nodes[Q]["value"]))
    torch.testing.assert_close(p.nodes[A]["value"], model.weights(latents)[A])
    assert guide.point_sites == (P, Q, B, "head.classifier.weight")
    grouped = [id(value) for values in guide.parameter_groups().values() for value in values]
    assert sorted(grouped) == sorted(id(value) for value in guide.parameters())


@pytest.mark.parametrize("kind", ["structured", "mean-field", "full"])
def test_every_guide_trains_and_has_a_mean_and_a_density(kind: str) -> None:
    program = tiny_program(ScalaBL(), targets=["query"])
    posterior = fit(program, tiny_rows(8), guide=kind, epochs=2, batch_size=4, progress=False)
    start, mean = program.model.initial(program.sites), posterior.mean()
    assert mean.keys() == {site.name for site in program.sites}
    draws = list(posterior.draws(2))
    for name in start:
        moved, drawn = not torch.equal(draws[0][name], start[name]), not torch.equal(draws[0][name], draws[1][name])
        assert moved and drawn == name.endswith("singular_values"), name
    name = "linear_16x16.A"
    torch.testing.assert_close(draws[0][name], program.model.weights(draws[0])[name])
    assert torch.isfinite(posterior.log_prob(draws[0])) and posterior.log_prior(draws[0]).keys() == {
        f"{name}.singular_values"
    }


def test_k_hat_is_of_the_singular_values_of_a_layer() -> None:
    posterior = fit(tiny_program(ScalaBL(eps=0.5), targets=["query"]), tiny_rows(8), epochs=1, progress=False)
    found = bl.diagnostics.khat_by_block(posterior, tiny_rows(8), 40, progress=False)
    assert len(found) == 2 and all(math.isfinite(shape) for shape in found.values())
    assert "as a joint law of 4 numbers" in _of_khat(9.0, 40, posterior, "sample")


@dataclass(frozen=True, kw_only=True)
class FixedVectors(ScalaBL):
    """With B and the singular vectors known: linear regression on the singular values."""

    name = "fixed-vectors"

    def sample(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        known = {name: value for name, value in self.initial(sites).items() if name not in self.stochastic(sites)}
        return poutine.condition(super().sample, data=known)(sites)

    def guide(self, sites: Sequence[Site]) -> Guide:
        part = self.site_guide(self.split(sites)[0][0])
        part.column_vectors.requires_grad_(False)
        part.rank_vectors.requires_grad_(False)
        return GuideList([part])


def test_the_posterior_of_a_regression_on_the_singular_values() -> None:
    known: Regression = lora_regression(noise=2.0)
    known.program.model = FixedVectors(scale=0.8)
    (site,) = known.program.model.split(known.program.sites)[0]
    parts = known.program.model.initial(known.program.sites)
    left, right = parts[f"{site.name}.column_vectors"], parts[f"{site.name}.rank_vectors"]
    offset, design = linear_parts(known.program, known.rows)
    # The outputs are linear in s: of each unit vector those of p_k q_k^T.
    units = torch.stack([product(left, unit[None], right).reshape(-1) for unit in torch.eye(2)], dim=1).double()
    deviation = known.program.model.sigma0(site).double().flatten()
    precision = (design @ units).T @ (design @ units) / 2.0**2 + torch.eye(2) / deviation**2
    labels = torch.as_tensor(known.rows["labels"][:]).double() - offset
    pull = (design @ units).T @ labels / 2.0**2 + site.singular_values[0].double() / deviation**2
    exact = torch.linalg.solve(precision, pull)
    posterior = fit(
        known.program, known.rows, batch_size=40, epochs=150, learning_rate=0.05, scale_learning_rate=0.05,
        schedule="cosine", max_grad_norm=1e9, particles=4, progress=False,
    )  # fmt: skip
    part = posterior.guide.parts[0]
    found = (part.sigma0 * part.log_eps.exp()).detach().double()[0]
    # The closest law of independent values has the exact mean, and of each the deviation given the others. Adam with
    # four draws a step stops within a tenth of a deviation; 0.04 was seen.
    best = precision.diagonal().rsqrt()
    assert ((part.mu.detach()[0] - exact) / best).abs().max() < 0.1
    torch.testing.assert_close(found, best, rtol=0.1, atol=0)


def test_what_needs_a_law_of_the_matrices_refuses_it() -> None:
    program = tiny_program(ScalaBL(), targets=["query"])
    with pytest.raises(PosteriorError, match="Site 'linear_16x16.A' is made of other sites' draws"):
        fit(program, tiny_rows(4), "laplace", progress=False)
    with pytest.raises(SettingError, match="estimator='flipout' needs a guide"):
        fit(program, tiny_rows(4), estimator="flipout", progress=False)
    with pytest.raises(SettingError, match="scalabl has the singular values of A alone: sites is 'both'"):
        ScalaBL(sites="both")


def test_a_chain_samples_values_and_vectors() -> None:
    program = tiny_program(ScalaBL(), targets=["query"])
    posterior = fit(program, tiny_rows(4), "sgld", draws=2, warmup=1, thin=1, progress=False)
    one, two = posterior.draws(2)
    name = "linear_16x16.A"
    torch.testing.assert_close(one[name], program.model.weights(one)[name])
    for part in ("singular_values", "column_vectors", "rank_vectors"):
        assert not torch.equal(one[f"{name}.{part}"], two[f"{name}.{part}"])


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    posterior = fit(text_program(tmp_path / "base", ScalaBL()), text_rows(8), epochs=1, batch_size=8, progress=False)
    posterior.save(tmp_path / "saved")
    loaded = bl.load(tmp_path / "saved", device="cpu")
    one, two = (next(iter(each.draws(1))) for each in (posterior, loaded))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(posterior.log_prob(one), loaded.log_prob(two))
