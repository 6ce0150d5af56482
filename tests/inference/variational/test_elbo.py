from __future__ import annotations

import gc
import itertools
import math
from collections import Counter
from functools import partial
from weakref import ref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from scenarios import lora_regression, tiny_batch, tiny_program, tiny_rows
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from bayeslora.inference.variational.elbo import ELBOS, RenyiBound, _divergences
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.inference.variational.posterior import prior_sites
from bayeslora.models import Gaussian, MonteCLoRA, WeightModel
from bayeslora.models.guides.auto import make_guide
from bayeslora.program import Program

N = 24
MODELS = {
    "covariance": MonteCLoRA(components=3),
    "precision": MonteCLoRA(components=3, wishart_on="precision"),
    "expanded": MonteCLoRA(components=3, collapse=False),
    "paper": MonteCLoRA(components=3, prior="paper", cooperation=0.5),
    "gaussian": Gaussian(sites="both"),
}


def objective(model: WeightModel, elbo: str = "mean-field", size: int = N, dropout: float = 0.0) -> NegativeELBO:
    """The loss of a tiny program, its guide away from where it started."""
    program = tiny_program(model, dropout=dropout)
    guide = make_guide("structured", model, program.sites)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return NegativeELBO(program, guide, ELBOS[elbo](num_particles=1), size).eval()


def remember(loss: NegativeELBO) -> list[tuple[Trace, Trace]]:
    """A list that gets the traces of the model and of the guide at each pass."""
    traces: list[tuple[Trace, Trace]] = []
    take = loss.elbo.take
    loss.elbo.take = lambda: (traces.append(take()), traces[-1])[1]
    return traces


def gradients(loss: NegativeELBO, batch: dict[str, Tensor], seed: int = 1) -> tuple[float, dict[str, Tensor]]:
    loss.zero_grad()
    torch.manual_seed(seed)
    value = loss(batch)
    value.backward()
    return float(value.detach()), {name: p.grad.clone() for name, p in loss.guide.named_parameters()}


def whole(loss: NegativeELBO) -> dict[str, Tensor]:
    return tiny_batch(loss.program, tiny_rows(N))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [2, 6, 12])
def test_loss_and_gradient_do_not_depend_on_the_batch_size(model: str, size: int) -> None:
    # All batches of a partition, each with the same draw of the weights: their mean is the loss of all rows at once.
    loss = objective(MODELS[model])
    batch = whole(loss)
    value, gradient = gradients(loss, batch)
    parts = [
        gradients(loss, {key: rows[start : start + size] for key, rows in batch.items()}) for start in range(0, N, size)
    ]
    assert math.isclose(value, sum(part for part, _ in parts) / len(parts), rel_tol=1e-4)
    for name, whole_gradient in gradient.items():
        mean = torch.stack([part[name] for _, part in parts]).mean(0)
        # Rounding of float32 sums of a few thousand terms.
        torch.testing.assert_close(mean, whole_gradient, rtol=2e-3, atol=2e-4 * float(whole_gradient.abs().max()))


@pytest.mark.parametrize("model", ["covariance", "precision", "gaussian"])
@pytest.mark.parametrize("size", [24, 240])
def test_the_loss_is_likelihood_of_all_rows_less_each_divergence_once(model: str, size: int) -> None:
    # Whatever the number of layers, rows a batch or steps: by hand, from the distributions and one pass.
    loss = objective(MODELS[model], size=size)
    batch, traces = whole(loss), remember(loss)
    with torch.no_grad():
        value = float(loss(batch))
        p, q = traces[-1]
        draw = {name: q.nodes[name]["value"] for name in q.stochastic_nodes}
        weights = loss.program.model.weights(draw)
        log_likelihood = loss.program.outputs(weights, batch).log_softmax(-1)[torch.arange(N), batch["labels"]].sum()
        random = [name for name in q.stochastic_nodes if type(q.nodes[name]["fn"]) is not dist.Delta]
        divergence = sum(kl_divergence(q.nodes[name]["fn"], p.nodes[name]["fn"]).sum() for name in random)
    assert math.isclose(value, float(-log_likelihood / N + divergence / size), rel_tol=1e-5)


class _Kernels(TorchDispatchMode):
    """Count the kernels by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_density_of_a_point_is_counted_from_where_it_starts(weight: float) -> None:
    loss = objective(Gaussian(weight_scale=0.5), size=N)
    loss.kl_weight = weight
    name, batch = "linear_16x16.B", whole(loss)
    with torch.no_grad():
        torch.manual_seed(0)
        start = float(loss(batch)) * N + float(loss._parts["log_likelihood"])
        assert loss.parts()[f"kl/{name}"] == pytest.approx(0, abs=1e-6)
        point = loss.guide.parts[-1].points[name.replace(".", "/")]
        point.add_(0.1)
        torch.manual_seed(0)
        moved = float(loss(batch)) * N + float(loss._parts["log_likelihood"])
    penalty = float((point.detach().square() - (point.detach() - 0.1).square()).sum() / (2 * 0.5**2))
    assert loss.parts()[f"kl/{name}"] * N == pytest.approx(penalty, rel=1e-4)
    assert moved - start == pytest.approx(weight * penalty, rel=1e-3)


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


@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_of_every_parameter_contains_the_likelihood(model: str) -> None:
    loss = objective(MODELS[model])
    batch = whole(loss)
    other = {**batch, "labels": (batch["labels"] + 1) % 3}
    (_, one), (_, two) = gradients(loss, batch), gradients(loss, other)
    for name in one:
        per_layer = (one[name] - two[name]).abs().flatten(1) if one[name].dim() > 1 else (one[name] - two[name]).abs()
        assert (per_layer > 0).any(-1).all(), f"{name}: the labels do not matter to it"


def test_gradient_checkpointing_sees_the_same_weights_and_dropout() -> None:
    loss = objective(MODELS["covariance"], dropout=0.1).train()
    batch = whole(loss)
    plain = gradients(loss, batch)
    another = gradients(loss, batch, seed=2)
    loss.program.network.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    calls = count_calls(loss.program.network.get_base_model().bert.encoder.layer[0].intermediate)
    checkpointed = gradients(loss, batch)
    assert next(calls) == 2  # once forward, once again backward
    assert plain[0] == checkpointed[0] != another[0]
    for name, value in plain[1].items():
        torch.testing.assert_close(checkpointed[1][name], value)


def count_calls(module: nn.Module) -> itertools.count[int]:
    calls = itertools.count()
    module.register_forward_pre_hook(lambda *_: (next(calls), None)[1])
    return calls


@pytest.mark.parametrize("elbo", ["mean-field", "trace"])
@pytest.mark.parametrize("model", ["covariance", "precision", "paper"])
def test_autocast_reaches_the_network_alone(model: str, elbo: str) -> None:
    loss = objective(MODELS[model], elbo)
    batch, traces = whole(loss), remember(loss)
    seen = []
    query = loss.program.network.get_base_model().bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    full, _ = gradients(loss, batch)
    parts = loss.parts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced, gradient = gradients(loss, batch)
    assert seen == [torch.float32, torch.bfloat16]
    p, q = traces[-1]
    for trace in (p, q):
        for name in trace.stochastic_nodes:
            node = trace.nodes[name]
            assert node["value"].dtype == torch.float32, name
            if elbo == "trace":
                assert node["log_prob_sum"].dtype == torch.float32, name
    difference = loss.parts()["log_likelihood"] - parts["log_likelihood"]
    assert difference != 0
    # The divergences are those of float32: all that changes is the log-likelihood.
    assert math.isclose(full - reduced, difference, rel_tol=1e-4, abs_tol=1e-4)
    assert all(torch.isfinite(value).all() for value in gradient.values())


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize(("model", "factors"), [("covariance", 0), ("paper", 3)])
def test_the_parts_of_the_bound_add_up(model: str, factors: int, weight: float) -> None:
    loss = objective(MODELS[model])
    loss.kl_weight = weight
    with torch.no_grad():
        value = float(loss(whole(loss)))
    parts = loss.parts()
    divergences = [part for name, part in parts.items() if name.startswith("kl/")]
    terms = [part for name, part in parts.items() if name.startswith("factor/")]
    assert (len(divergences), len(terms)) == (14, factors)
    assert math.isclose(-value, parts["log_likelihood"] - weight * (sum(divergences) - sum(terms)), rel_tol=1e-5)


@pytest.mark.parametrize("elbo", ["mean-field", "trace"])
@pytest.mark.parametrize("model", ["covariance", "paper"])
def test_the_kl_weight_scales_the_divergence_alone(model: str, elbo: str) -> None:
    loss = objective(MODELS[model], elbo)
    batch = whole(loss)
    found = {}
    for weight in (0.0, 0.5, 1.0):
        loss.kl_weight = weight
        found[weight], _ = gradients(loss, batch)
    assert math.isclose(found[0.0], -loss.parts()["log_likelihood"], rel_tol=1e-5)
    assert math.isclose(found[0.5], (found[0.0] + found[1.0]) / 2, rel_tol=1e-4)


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


@pytest.mark.parametrize("guide", ["structured", "mean-field", "low-rank", "delta"])
@pytest.mark.parametrize("model", ["covariance", "paper", "gaussian"])
def test_the_mean_field_bound_is_pyros(model: str, guide: str) -> None:
    program = tiny_program(MODELS[model])
    made = make_guide(guide, program.model, program.sites, 0.1)
    batch = tiny_batch(program, tiny_rows(N))
    found = []
    for elbo in (ELBOS["mean-field"](num_particles=2), TraceMeanField_ELBO(num_particles=2)):
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


def test_the_state_is_the_guides_alone_and_is_loaded_whole() -> None:
    loss = objective(MODELS["covariance"])
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    assert state.keys() == loss.guide.state_dict().keys()
    other = objective(MODELS["covariance"])
    other.load_state_dict(state, strict=False)
    assert all(torch.equal(value, state[name]) for name, value in other.guide.state_dict().items())
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state, strict=False)


def test_a_pass_leaves_no_noise_behind() -> None:
    loss = objective(MODELS["covariance"])
    program: Program = loss.program
    keys = set(program.network.state_dict())
    buffers = {name for name, _ in loss.named_buffers()}
    batch = whole(loss)
    for seed in range(2):
        gradients(loss, batch, seed)
    program.weights.restore()
    assert set(program.network.state_dict()) == keys
    assert {name for name, _ in loss.named_buffers()} == buffers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in program.network.modules())


@pytest.mark.parametrize("elbo", ["mean-field", "trace"])
def test_no_graph_lives_on_after_a_step(elbo: str) -> None:
    loss, kept = objective(MODELS["covariance"], elbo), []
    traces = loss.elbo._get_trace
    loss.elbo._get_trace = lambda *arguments: (found := traces(*arguments), kept.extend(map(ref, found)))[0]
    loss(whole(loss)).backward()
    gc.collect()
    assert [trace() for trace in kept] == [None, None]


@pytest.mark.parametrize("prior_mean", ["learned", "model"])
def test_the_prior_goes_where_the_program_goes(prior_mean: str) -> None:
    program = tiny_program(Gaussian(), targets=["query"])
    guide = make_guide("structured", program.model, program.sites)
    sites = partial(prior_sites, program, guide, prior_mean)
    loss = NegativeELBO(program, guide, ELBOS["mean-field"](), N, sites=sites)
    loss.to("meta")
    assert loss.sites is not None
    found = [value for site in loss.sites for value in (site.initial, site.centre) if value is not None]
    assert len(found) == len(program.sites) + (prior_mean == "learned")
    assert {value.device.type for value in found} == {"meta"}
