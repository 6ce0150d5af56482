"""The loss of a batch: what it counts, what it weighs, and what it leaves behind."""

from __future__ import annotations

import gc
import itertools
import math
from functools import partial
from weakref import ref

import pyro.distributions as dist
import pytest
import torch
from elbo_scenarios import MODELS, N, gradients, objective, remember, whole
from scenarios import tiny_program
from torch import nn
from torch.distributions import kl_divergence

from bayeslora.inference.training.objective import State
from bayeslora.inference.variational.elbo import ELBOS
from bayeslora.inference.variational.loss import KLSchedule, KLWarmup, NegativeELBO
from bayeslora.inference.variational.posterior import prior_sites
from bayeslora.models import Gaussian
from bayeslora.models.guides.auto import make_guide
from bayeslora.program import Program


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


@pytest.mark.parametrize(
    ("schedule", "part", "shares"),
    [
        ("linear", 0.5, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("step", 0.5, [0, 0, 0, 0, 1, 1, 1, 1]),
        ("step", 1 / 3, [0, 0, 1, 1, 1, 1]),
        ("step", 0.7, [0] * 7 + [1] * 3),
        ("step", 0.4, [0, 1, 1]),  # of three steps the first alone is over by then
    ],
)
def test_the_weight_of_the_divergence_step_by_step(schedule: KLSchedule, part: float, shares: list[float]) -> None:
    loss, found = objective(Gaussian()), []
    for step in range(len(shares)):
        KLWarmup(loss, 0.2, part, schedule).before_step(State(step, len(shares), 0.0))
        found.append(loss.kl_weight)
    assert found == pytest.approx([0.2 * share for share in shares])


def test_before_the_step_the_loss_is_the_likelihood_alone() -> None:
    loss = objective(Gaussian())
    warmup, batch = KLWarmup(loss, 0.2, 0.5, "step"), whole(loss)
    for step, weight in ((4, 0.0), (5, 0.2)):
        warmup.before_step(State(step, 10, 0.0))
        value, gradient = gradients(loss, batch)
        parts = loss.parts()
        divergence = sum(value for name, value in parts.items() if name.startswith("kl/"))
        assert divergence > 1 and value == pytest.approx(weight * divergence - parts["log_likelihood"], rel=1e-5)
        assert all(each.isfinite().all() for each in gradient.values())


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
