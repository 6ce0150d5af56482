from __future__ import annotations

import math
from collections import Counter

import pyro
import pytest
import torch
from elbo_scenarios import MODELS, N, gradients, objective, remember, whole
from pyro.infer import TraceMeanField_ELBO
from scenarios import lora_regression, tiny_batch, tiny_program, tiny_rows
from torch import Tensor
from torch.distributions import kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from bayeslora.inference.variational.elbo import ELBOS, RememberingBound, RenyiBound, _divergences
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.models.guides.auto import make_guide


class _Kernels(TorchDispatchMode):
    """Count the kernels by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["covariance", "expanded"])
def test_divergences_of_hyper_sites_are_taken_once_for_all_groups_of_layers(model: str) -> None:
    loss = objective(MODELS[model])
    names = [site.name for site in loss.program.sites if site.role == "A"]
    traces = remember(loss)
    loss(whole(loss))
    with _Kernels() as kernels:
        found = list(_divergences(*traces[-1]))
    # That of the Dirichlet laws, the formula of which has four logarithms of the gamma function.
    assert len(names) > 1 and kernels.found["lgamma"] == 4 and kernels.found["digamma"] == 2
    assert len(found) == len(traces[-1][0].stochastic_nodes) - 2 * (len(names) - 1)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_joined_divergences_have_the_weight_and_sum_of_single_ones(weight: float) -> None:
    loss = objective(MODELS["covariance"])
    loss.kl_weight, traces = weight, remember(loss)
    loss(whole(loss))
    p, q = traces[-1]
    expected = sum(kl_divergence(q.nodes[name]["fn"], p.nodes[name]["fn"]).sum() for name in p.stochastic_nodes)
    torch.testing.assert_close(torch.stack(list(_divergences(p, q))).sum(), weight * expected)


def regression_loss(elbo: str, particles: int = 1) -> tuple[NegativeELBO, dict[str, Tensor], float]:
    """An exactly solvable program with a normal guide at the posterior mean, of another width."""
    known = lora_regression()
    program = known.program
    guide = make_guide("full", program.model, program.sites, 0.3)
    with torch.no_grad():
        guide.get_parameter("parts.0.auto.loc").copy_(known.mean)
    loss = NegativeELBO(program, guide, ELBOS[elbo](num_particles=particles), len(known.rows))
    return loss, tiny_batch(program, known.rows), known.log_evidence


def test_closed_form_and_monte_carlo_divergences_agree() -> None:
    one, two = objective(MODELS["covariance"]), objective(MODELS["covariance"], "trace")
    two.guide.load_state_dict(one.guide.state_dict())
    batch = whole(one)
    values = {}
    for name, loss in (("closed", one), ("sampled", two)):
        torch.manual_seed(3)
        with torch.no_grad():
            values[name] = torch.stack([loss(batch) for _ in range(40)]).double()
    # The same draws in pairs: only the noise of the sampled divergence is left. Four standard errors.
    difference = values["closed"] - values["sampled"]
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference))
    assert values["closed"].std() < values["sampled"].std()


class Pyros(RememberingBound, TraceMeanField_ELBO):
    """Pyro's own bound."""


@pytest.mark.parametrize("guide", ["structured", "mean-field", "low-rank", "delta"])
@pytest.mark.parametrize("model", ["covariance", "paper", "gaussian"])
def test_the_mean_field_bound_is_pyros(model: str, guide: str) -> None:
    program = tiny_program(MODELS[model])
    made = make_guide(guide, program.model, program.sites, 0.1)
    batch = tiny_batch(program, tiny_rows(N))
    found = []
    for elbo in (ELBOS["mean-field"](num_particles=2), Pyros(num_particles=2)):
        torch.manual_seed(8)
        made.zero_grad()
        loss = NegativeELBO(program, made, elbo, N).eval()
        loss.kl_weight = 0.7
        value = loss(batch)
        value.backward()
        found.append((value.detach(), {name: p.grad.clone() for name, p in made.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for name, value in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max() + 1))


def test_the_path_gradient_has_no_noise_at_the_posterior_and_no_bias_elsewhere() -> None:
    loss, batch, evidence = regression_loss("path")
    other, _, _ = regression_loss("mean-field")
    known, auto = lora_regression(), loss.guide.parts[0].auto

    def gradients_of(each: NegativeELBO) -> Tensor:
        each.guide.zero_grad()
        each(batch).backward()
        return torch.cat([value.grad.flatten() for value in each.guide.parameters()])

    torch.manual_seed(4)
    differences = torch.stack([gradients_of(loss) - gradients_of(other) for _ in range(200)])
    moving = differences.std(0) > 0  # all but the upper half of a triangular factor
    scores = differences.mean(0)[moving] / (differences.std(0)[moving] / 200**0.5)
    assert scores.abs().max() < 4.5  # standard errors, of some thirty entries

    factor = torch.linalg.cholesky(known.covariance).float()
    with pyro.settings.context(module_local_params=True), torch.no_grad():
        auto.scale = factor.diagonal()
        auto.scale_tril = factor / factor.diagonal()[:, None]
    values = torch.stack([loss(batch).detach() for _ in range(5)])
    torch.testing.assert_close(-len(known.rows["labels"]) * values, torch.full((5,), evidence), rtol=0, atol=1e-2)
    assert gradients_of(loss).abs().max() < 1e-3 < gradients_of(other).abs().max()


def test_one_particle_makes_the_renyi_bound_the_elbo() -> None:
    found = {}
    for elbo in ("trace", "renyi"):
        loss, batch, _ = regression_loss(elbo)
        found[elbo] = gradients(loss, batch)
    assert found["trace"][0] == pytest.approx(found["renyi"][0], rel=1e-6)
    for name, value in found["trace"][1].items():
        torch.testing.assert_close(found["renyi"][1][name], value)


def bounds(loss: NegativeELBO, batch: dict[str, Tensor], elbo: str, particles: int, seed: int) -> Tensor:
    """The bounds of all rows from eight draws, ``particles`` to each."""
    one = NegativeELBO(loss.program, loss.guide, ELBOS[elbo](num_particles=particles), loss.size)
    torch.manual_seed(seed)
    return -loss.size * torch.stack([one(batch).detach() for _ in range(8 // particles)]).double()


def test_the_renyi_bound_lies_between_elbo_and_evidence_and_tightens() -> None:
    loss, batch, log_evidence = regression_loss("renyi")
    tightest = []
    for seed in range(10):
        # From the same eight draws, so that by Jensen's inequality the order holds without Monte Carlo error.
        elbo = bounds(loss, batch, "trace", 1, seed).mean()
        two = bounds(loss, batch, "renyi", 2, seed).mean()
        eight = bounds(loss, batch, "renyi", 8, seed).mean()
        assert elbo + 0.1 < two < eight - 0.1
        tightest.append(eight)
    values = torch.stack(tightest)
    assert values.mean() < log_evidence + 3 * values.std() / math.sqrt(10)


def test_the_renyi_bound_is_its_definition() -> None:
    loss, batch, _ = regression_loss("renyi", 3)
    loss.elbo = RenyiBound(order=0.25, num_particles=3)
    torch.manual_seed(5)
    value = -loss.size * float(loss(batch).detach())
    one = NegativeELBO(loss.program, loss.guide, ELBOS["trace"](), loss.size)
    torch.manual_seed(5)
    ratios = torch.stack([-loss.size * one(batch).detach() for _ in range(3)]).double()
    shift = ratios.max()
    expected = shift + (0.75 * (ratios - shift)).exp().mean().log() / 0.75
    assert math.isclose(value, float(expected), rel_tol=1e-5)
