"""MonteCLoRA: laws of the prior and guide, gradients, and the bound on a model whose evidence is known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch import Tensor
from torch.distributions import kl_divergence

from bayeslora import models
from bayeslora.errors import SettingError
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.models.distributions import ColumnNormal
from bayeslora.sites import Site

#: Bound in standard errors: 5 is exceeded by chance once in 1.7 million.
ERRORS = 5.0
A = "linear_5x4.A"
VARIANTS = [
    MonteCLoRA(),
    MonteCLoRA(wishart_on="precision"),
    MonteCLoRA(prior="paper", cooperation=0.5),
    MonteCLoRA(collapse=False),
    MonteCLoRA(collapse=False, prior="paper", wishart_on="precision"),
    MonteCLoRA(sites="both", learn_eps=True, eps=0.3, centre="zero"),
]


def draws(callable_, count: int, name: str) -> Tensor:
    """Values (count, ...) of one weight under a Pyro callable that returns weights by site."""
    with torch.no_grad():
        return torch.stack([callable_()[name] for _ in range(count)])


def moved(guide: torch.nn.Module) -> torch.nn.Module:
    """The guide with all parameters some way off their start, so that no term vanishes by accident."""
    with torch.no_grad():
        for value in guide.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return guide


def site_divergences(model: MonteCLoRA, guide: torch.nn.Module, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """Closed divergence of each latent site at one draw of the guide."""
    q = poutine.trace(guide).get_trace()
    p = poutine.trace(poutine.replay(partial(model.sample, sites), trace=q)).get_trace()
    return {name: kl_divergence(q.nodes[name]["fn"], p.nodes[name]["fn"]) for name in q.stochastic_nodes}


@pytest.mark.parametrize("model", VARIANTS, ids=repr)
class TestEveryVariant:
    def test_prior_returns_all_weights_in_shape(self, model: MonteCLoRA, sites: tuple[Site, ...]) -> None:
        weights = poutine.trace(model.sample).get_trace(sites).nodes["_RETURN"]["value"]
        assert {name: value.shape for name, value in weights.items()} == {
            site.name: site.initial.shape for site in sites
        }
        assert {value.dtype for value in weights.values()} == {torch.float64}

    def test_latent_sites_are_those_announced(self, model: MonteCLoRA, sites: tuple[Site, ...]) -> None:
        trace = poutine.trace(model.sample).get_trace(sites)
        latent = {name: node["value"].shape for name, node in trace.iter_stochastic_nodes()}
        initial = model.initial(sites)
        assert latent == {name: value.shape for name, value in initial.items()}
        assert list(latent) == list(initial)
        assert model.stochastic(sites) < set(latent)
        for name, node in trace.iter_stochastic_nodes():
            assert node["fn"].batch_shape == ()
            assert node["fn"].support.check(initial[name]).all()
        starts = model.weights(initial)
        for site in sites:
            torch.testing.assert_close(starts[site.name], site.initial)

    def test_guide_samples_every_site_in_the_models_order(self, model: MonteCLoRA, sites: tuple[Site, ...]) -> None:
        guide = model.guide(sites)
        names = [name for name, _ in poutine.trace(guide).get_trace().iter_stochastic_nodes()]
        assert names == list(model.initial(sites)) == list(guide.latents)
        for site in sites:
            torch.testing.assert_close(guide.mean()[site.name], site.initial)

    def test_mean_field_bound_is_the_sampled_one_on_average(self, model: MonteCLoRA, sites: tuple[Site, ...]) -> None:
        guide, prior = moved(model.guide(sites)), partial(model.sample, sites)
        differences = []
        for seed in range(40):
            # The same draw under both: given a site's parents, the sampled term averages to the closed one.
            losses = []
            for bound in (TraceMeanField_ELBO(), Trace_ELBO()):
                torch.manual_seed(seed)
                with torch.no_grad():
                    losses.append(bound.differentiable_loss(prior, guide))
            differences.append(losses[0] - losses[1])
        difference = torch.stack(differences)
        assert difference.mean().abs() <= ERRORS * difference.std() / math.sqrt(len(difference)) + 1e-9

    def test_every_parameter_hears_the_likelihood(self, model: MonteCLoRA, sites: tuple[Site, ...]) -> None:
        # No divergence in the loss at all: gradients come through the sampled weights alone.
        guide = model.guide(sites)
        trace = poutine.trace(guide).get_trace()
        weights = poutine.replay(partial(model.sample, sites), trace=trace)()
        sum((value - 1).square().sum() for value in weights.values()).backward()
        for name, value in guide.named_parameters():
            assert value.grad is not None and (value.grad != 0).any(), name

    def test_every_parameter_moves_in_training(self, model: MonteCLoRA, sites: tuple[Site, ...]) -> None:
        guide = model.guide(sites)
        before = {name: value.detach().clone() for name, value in guide.named_parameters()}
        optimiser = torch.optim.Adam(guide.parameters(), lr=0.01)
        for _ in range(5):
            optimiser.zero_grad()
            TraceMeanField_ELBO().differentiable_loss(partial(conditioned, model, sites), guide).backward()
            optimiser.step()
        for name, value in guide.named_parameters():
            assert (value != before[name]).any(), name


def conditioned(model: MonteCLoRA, sites: tuple[Site, ...]) -> None:
    """A toy likelihood: every weight is observed around one with unit noise."""
    for name, value in model.sample(sites).items():
        pyro.sample(f"y.{name}", dist.Normal(value, 1.0).to_event(), obs=torch.ones_like(value))


class TestConstants:
    """What is made once for all steps is of the model, the weights and the place that ask for it."""

    def laws(self, model: MonteCLoRA, sites: tuple[Site, ...]) -> dict[str, dist.TorchDistribution]:
        trace = poutine.trace(model.sample).get_trace(sites)
        return {name: node["fn"].base_dist for name, node in trace.iter_stochastic_nodes() if name.startswith(A)}

    def test_other_settings_and_other_weights_have_their_own(self, sites: tuple[Site, ...]) -> None:
        found = self.laws(MonteCLoRA(), sites)
        other = MonteCLoRA(nu=9.0, alpha0=2.0, components=3, scale=2 * MonteCLoRA().scale)
        larger = tuple(replace(site, initial=3 * site.initial) for site in sites)
        for model, given, factor in ((other, sites, 2.0), (MonteCLoRA(), larger, 3.0), (MonteCLoRA(), sites, 1.0)):
            laws = self.laws(model, given)
            assert laws[f"{A}.scale_tril"].degrees == model.degrees(sites[0].initial.shape[-1])
            expected = torch.full((3, model.components), model.alpha0, dtype=torch.float64)
            torch.testing.assert_close(laws[f"{A}.mixture"].concentration, expected)
            torch.testing.assert_close(model.sigma0(given[0]), factor * MonteCLoRA().sigma0(sites[0]))
            assert laws[A].loc is given[0].initial
        single = tuple(replace(site, initial=site.initial.float()) for site in sites)
        assert {law.mean.dtype for law in self.laws(MonteCLoRA(), single).values()} == {torch.float32}
        assert found[f"{A}.mixture"] is self.laws(MonteCLoRA(), sites)[f"{A}.mixture"]

    def test_a_draw_for_predictions_leaves_what_training_can_use(self, make_sites) -> None:
        model, sites = MonteCLoRA(nu=11.0, scale=1.25), make_sites(layers=4)
        guide = moved(model.guide(sites))
        with torch.inference_mode():
            model.sample(sites)
            guide()
        assert not sites[0].size.is_inference() and not model.sigma0(sites[0]).is_inference()
        torch.stack([value.sum() for value in guide().values()]).sum().backward()
        sum(value.sum() for value in site_divergences(model, guide, sites).values()).backward()
        assert all(value.grad is not None for value in guide.parts[0].parameters())


class TestScale:
    @pytest.mark.parametrize("wishart_on", ["covariance", "precision"])
    @pytest.mark.parametrize("components", [1, 4])
    @pytest.mark.parametrize("rank", [1, 4, 32])
    def test_noise_is_sigma0_at_every_rank(self, wishart_on: str, components: int, rank: int, make_sites) -> None:
        sites = make_sites(rank=rank, layers=200, columns=2)
        model = models.build("monteclora", wishart_on=wishart_on, components=components, scale=0.5)
        site = sites[0]
        for source in (partial(model.sample, sites), model.guide(sites)):
            squares = (draws(source, 4, A) - site.initial).square() / model.sigma0(site).square()
            # Entries of one layer share (Sigma, pi): the 800 layers are the independent draws.
            layers = squares.mean((-2, -1)).flatten()
            assert (layers.mean() - 1).abs() <= ERRORS * layers.std() / math.sqrt(len(layers))

    def test_eps_scales_the_guides_noise(self, sites: tuple[Site, ...]) -> None:
        torch.manual_seed(3)
        wide = MonteCLoRA(eps=1.0).guide(sites)()[A] - sites[0].initial
        torch.manual_seed(3)
        narrow = MonteCLoRA(eps=0.1).guide(sites)()[A] - sites[0].initial
        torch.testing.assert_close(narrow, 0.1 * wide)


class TestCollapse:
    @pytest.mark.parametrize("prior", ["hierarchical", "paper"])
    def test_collapsed_and_expanded_have_one_law(self, prior: str, sites: tuple[Site, ...]) -> None:
        count = 4000
        # As many equal layers as draws: one call of the prior gives them all.
        site = repeated(sites[0], count)
        samples = []
        for collapse in (True, False):
            model = models.build("monteclora", collapse=collapse, prior=prior)
            samples.append((model.sample([site])[A] - site.initial).unflatten(0, (count, 3)))
        for power in (1, 2):
            moments = [value.pow(power) for value in samples]
            error = (sum(value.var(0) for value in moments) / count).sqrt()
            assert ((moments[0].mean(0) - moments[1].mean(0)).abs() <= ERRORS * error).all()
        for function in (lambda value: value[:, 0, 0, 0], lambda value: value[:, 1].sum((-2, -1))):
            # A p-value below 1e-4 would come once in ten thousand runs; the seed is fixed.
            assert stats.ks_2samp(*(function(value).numpy() for value in samples)).pvalue > 1e-4

    def test_given_covariance_and_mixture_the_moments_are_exact(self, sites: tuple[Site, ...]) -> None:
        model, expanded = MonteCLoRA(), MonteCLoRA(collapse=False)
        site = sites[0]
        values = poutine.trace(model.sample).get_trace(sites).nodes
        factor, mixture = values[f"{A}.scale_tril"]["value"], values[f"{A}.mixture"]["value"]
        whole = model.column_law(site.initial, model.unit(site), mixture, factor).base_dist
        parts = expanded.column_law(site.initial, model.unit(site), mixture, factor).base_dist
        # Var(sum_k pi_k z_k) = sum_k pi_k^2 Var(z_k).
        summed = (mixture.square()[..., None, None] * parts.covariance_matrix).sum(1)
        torch.testing.assert_close(whole.covariance_matrix, summed)
        torch.testing.assert_close(whole.mean, models.monteclora.weighted_sum(mixture, parts.mean))

    def test_the_expanded_bound_is_looser(self, sites: tuple[Site, ...]) -> None:
        """KL of N draws is at least that of their sum, at any (Sigma, pi): data processing."""
        found = {}
        for collapse in (True, False):
            model = MonteCLoRA(collapse=collapse, eps=0.5)
            torch.manual_seed(1)
            guide = model.guide(sites)
            with torch.no_grad():
                guide.parts[0].mu.add_(0.3)
            torch.manual_seed(2)
            found[collapse] = site_divergences(model, guide, sites)
        torch.testing.assert_close(found[True][f"{A}.mixture"], found[False][f"{A}.mixture"])
        assert found[False][f"{A}.components"] > found[True][A]


class TestObjective:
    def test_hierarchical_divergence_at_the_start_is_zero(self, sites: tuple[Site, ...]) -> None:
        found = site_divergences(MonteCLoRA(), MonteCLoRA().guide(sites), sites)
        for name in (A, f"{A}.scale_tril", f"{A}.mixture"):
            torch.testing.assert_close(found[name], torch.zeros((), dtype=torch.float64), atol=1e-10, rtol=0)

    def test_papers_column_divergence(self, sites: tuple[Site, ...]) -> None:
        """Sum over the n columns of (eps^2 |pi|^2 tr Sigma + |mu|^2) / sigma0^2 - r - log det, halved."""
        model = MonteCLoRA(prior="paper", eps=0.4, centre="zero")
        guide, site = moved(model.guide(sites)), sites[0]
        q = poutine.trace(guide).get_trace()
        factor, mixture = q.nodes[f"{A}.scale_tril"]["value"], q.nodes[f"{A}.mixture"]["value"]
        p = poutine.trace(poutine.replay(partial(model.sample, sites), trace=q)).get_trace()
        square = (0.4 * model.unit(site)).square() * mixture.square().sum(-1)[:, None, None]
        covariance = square * factor @ factor.mT / model.sigma0(site).square()
        shift = (guide.parts[0].mu / model.sigma0(site)).square().sum((-2, -1))
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        expected = (5 * (trace - 2 - covariance.logdet()) + shift).sum() / 2
        torch.testing.assert_close(kl_divergence(q.nodes[A]["fn"], p.nodes[A]["fn"]), expected)

    def test_cooperation_enters_the_joint_density(self, sites: tuple[Site, ...]) -> None:
        model = MonteCLoRA(prior="paper", cooperation=0.5)
        trace = poutine.trace(model.sample).get_trace(sites)
        expected = -0.5 * trace.nodes[f"{A}.mixture"]["value"].square().sum()
        torch.testing.assert_close(trace.nodes[f"{A}.cooperation"]["fn"].log_factor, expected)

    @pytest.mark.parametrize(
        "model",
        [
            MonteCLoRA(learn_eps=True, scale=1.5),
            MonteCLoRA(learn_eps=True, scale=1.5, wishart_on="precision"),
            Gaussian(scale=1.5),
        ],
    )
    def test_bound_stays_below_the_exact_evidence(self, model: models.WeightModel, sites: tuple[Site, ...]) -> None:
        """Columns observed with normal noise: given (Sigma, pi) the evidence is exact, and averages over the prior."""
        site, noise = sites[0], 0.2
        data = site.initial + noise * torch.randn_like(site.initial)

        def joint() -> None:
            value = model.sample([site])[A]
            pyro.sample("y", dist.Normal(value, noise).to_event(3), obs=data)

        evidence = given_hyperparameters(model, site, data, noise, count=20_000)
        # Layers are independent: each layer's evidence is averaged by itself.
        exact = (evidence.logsumexp(0) - math.log(len(evidence))).sum()
        guide = model.guide([site])
        optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
        elbo = TraceMeanField_ELBO()
        for _ in range(120):
            optimiser.zero_grad()
            elbo.differentiable_loss(joint, guide).backward()
            optimiser.step()
        with torch.no_grad():
            bound = -torch.stack([elbo.differentiable_loss(joint, guide) for _ in range(100)])
        # The bound's own error; the evidence's is below 0.01 nats at 20,000 draws.
        error = bound.std() / math.sqrt(len(bound)) + 0.01
        assert bound.mean() <= exact + ERRORS * error
        # A family that holds the posterior up to its hyperparameters is not far below: by 1.6 nats in each of 3 layers,
        # and by 30 before it learned.
        assert bound.mean() > exact - 6


def given_hyperparameters(model: models.WeightModel, site: Site, data: Tensor, noise: float, count: int) -> Tensor:
    """Log-evidence (count, layers) of the columns given each of ``count`` prior draws of the hyperparameters."""
    many = repeated(site, count)
    law: ColumnNormal = poutine.trace(model.sample).get_trace([many]).nodes[A]["fn"].base_dist
    covariance = (law.covariance_matrix + noise**2 * torch.eye(2, dtype=torch.float64)).expand(3 * count, 2, 2)
    marginal = torch.distributions.MultivariateNormal(law.loc, covariance.unsqueeze(1))
    return marginal.log_prob(data.repeat(count, 1, 1)).sum(-1).unflatten(0, (count, 3))


def repeated(site: Site, count: int) -> Site:
    """The site with its layers ``count`` times over: independent draws of them in one call."""
    return Site(site.name, site.role, site.group, site.initial.repeat(count, 1, 1), site.layers * count)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"components": 0}, "components should be greater"),
            ({"nu": math.inf}, "nu should be a finite number"),
            ({"prior": "flat"}, "prior should be 'hierarchical' or 'paper'"),
            ({"wishart_on": "both"}, "wishart_on should be"),
            ({"centre": "mean"}, "centre should be 'init' or 'zero'"),
            ({"sites": "C"}, "sites should be 'A', 'B' or 'both'"),
            ({"scale": 0.0}, "scale should be greater than 0, found 0.0"),
            ({"eps": math.nan}, "eps should be less than .*, found nan"),
            ({"cooperation": -1.0, "prior": "paper"}, "cooperation should be greater"),
            ({"cooperation": 1.0}, "prior='paper'"),
        ],
    )
    def test_wrong_values_are_refused(self, settings: dict, message: str) -> None:
        with pytest.raises(SettingError, match=message):
            MonteCLoRA(**settings)

    def test_degrees_of_freedom_at_the_boundary(self, sites: tuple[Site, ...]) -> None:
        assert MonteCLoRA().degrees(8) == 19
        assert MonteCLoRA(nu=8).degrees(8) == 8
        with pytest.raises(SettingError, match="nu=7.0 must exceed 7"):
            MonteCLoRA(nu=7).degrees(8)
        with pytest.raises(SettingError, match="nu=3.0 must exceed 3 .* precision"):
            MonteCLoRA(nu=3, wishart_on="precision").sample(sites)

    def test_build(self) -> None:
        assert models.build("monteclora", components="8") == MonteCLoRA(components=8)
        assert set(models.MODELS) == {"monteclora", "gaussian", "scalabl"}
        with pytest.raises(SettingError, match="Did you mean 'monteclora'"):
            models.build("montclora")
        with pytest.raises(SettingError, match="components"):
            models.build("monteclora", component=3)


def test_layers_are_independent_of_their_order(sites: tuple[Site, ...]) -> None:
    model, site, order = MonteCLoRA(), sites[0], [2, 0, 1]
    turned = Site(site.name, site.role, site.group, site.initial[order], tuple(site.layers[i] for i in order))
    trace = poutine.trace(model.sample).get_trace([site])
    values = {name: node["value"] for name, node in trace.iter_stochastic_nodes()}
    other = poutine.condition(model.sample, data={name: value[order] for name, value in values.items()})
    torch.testing.assert_close(poutine.trace(other).get_trace([turned]).log_prob_sum(), trace.log_prob_sum())
