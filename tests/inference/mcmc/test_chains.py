from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arviz as az
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from scenarios import Regression, lora_regression, text_program, text_rows, tiny_batch, tiny_program, tiny_rows
from torch import Tensor

from bayeslora.errors import PosteriorError, SettingError, TrainingError
from bayeslora.inference import fit, load
from bayeslora.inference.mcmc import nuts
from bayeslora.inference.mcmc.chains import Tempering
from bayeslora.inference.mcmc.posterior import EmpiricalPosterior
from bayeslora.inference.mcmc.sgld import Unconstrained
from bayeslora.inference.mcmc.steps import Gradient, Meter, Stiffness
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.passes import undisturbed
from bayeslora.rng import isolated

SITE = "linear_2x1.A"


@pytest.fixture(scope="module")
def known() -> Regression:
    return lora_regression(columns=2, rank=1, noise=2.0)


def drawn(known: Regression, backend: str, **settings: Any) -> tuple[Tensor, Tensor]:
    """Draws (draws, weights) less the exact mean in the posterior's eigenvectors, and the precisions along them."""
    posterior = fit(known.program, known.rows, backend, progress=False, **settings)
    assert isinstance(posterior, EmpiricalPosterior)
    variances, vectors = torch.linalg.eigh(known.covariance)
    return (posterior.chain[SITE].flatten(1).double() - known.mean) @ vectors, 1 / variances


def assert_moments(draws: Tensor, variances: Tensor) -> None:
    """Within four standard errors at the effective sample sizes of mean and of square."""
    for each, variance in zip(draws.T, variances, strict=True):
        ess = float(az.ess(each.numpy()[None], method="mean"))
        assert abs(float(each.mean())) < 4 * math.sqrt(float(variance) / ess)
        ess = float(az.ess(each.square().numpy()[None], method="mean"))
        assert abs(float(each.square().mean() / variance) - 1) < 4 * math.sqrt(2 / ess)


def test_nuts_recovers_the_exact_posterior(known: Regression) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The chain|.*diverged")  # nothing is wrong with this one
        draws, precisions = drawn(known, "nuts", draws=400, warmup=100)
    assert_moments(draws, 1 / precisions)


def test_a_chain_that_is_no_sample_says_so(known: Regression, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"not converged: the split R-hat of its worst weight is (\d+\.\d+|inf),"):
        posterior = fit(known.program, known.rows, "nuts", draws=4, warmup=1, progress=False)
    assert posterior.record.history[0]["r_hat"] > 1.1
    told = nuts.mcmc.MCMC.diagnostics
    places = {"chain 0": [3, 7]}
    monkeypatch.setattr(nuts.mcmc.MCMC, "diagnostics", lambda sampler: told(sampler) | {"divergences": places})
    with pytest.warns(UserWarning, match="2 of 4 transitions diverged"):
        fit(known.program, known.rows, "nuts", draws=4, warmup=1, progress=False)


def test_a_chain_of_chosen_steps_recovers_the_exact_posterior(known: Regression) -> None:
    draws, precisions = drawn(known, "sghmc", draws=1200, warmup=100, thin=1, batch_size=40, bias=0.01)
    assert_moments(draws, 1 / precisions)  # a hundredth is a twentieth of the Monte Carlo error


@pytest.mark.parametrize(
    ("backend", "settings"),
    [("nuts", {"draws": 400, "warmup": 100}), ("sghmc", {"draws": 1200, "warmup": 100, "thin": 1, "bias": 0.01})],
)
def test_a_temperature_divides_the_likelihood_and_leaves_the_prior(
    known: Regression, backend: str, settings: dict[str, Any]
) -> None:
    precision, prior = torch.linalg.inv(known.covariance), torch.eye(len(known.mean), dtype=torch.float64)
    covariance = torch.linalg.inv((precision - prior) / 0.25 + prior)
    mean = covariance @ precision @ known.mean / 0.25
    posterior = fit(known.program, known.rows, backend, temperature=0.25, progress=False, **settings)
    assert isinstance(posterior, EmpiricalPosterior) and posterior.record.temperature == 0.25
    variances, vectors = torch.linalg.eigh(covariance)
    # At a temperature of 1 variances are 3.6 and 3.5 times as large.
    assert_moments((posterior.chain[SITE].flatten(1).double() - mean) @ vectors, variances)


def test_a_temperature_leaves_a_factor_of_the_prior() -> None:
    program = tiny_program(MonteCLoRA(prior="paper", cooperation=5.0))
    batch = tiny_batch(program, tiny_rows(8))
    torch.manual_seed(0)
    drawn = poutine.trace(program).get_trace(batch, 8)
    again = poutine.trace(poutine.replay(Tempering(0.1)(program), trace=drawn)).get_trace(batch, 8)
    drawn.compute_log_prob()
    again.compute_log_prob()
    ratios = {
        name: float(again.nodes[name]["log_prob_sum"] / node["log_prob_sum"])
        for name, node in drawn.nodes.items()
        if node["type"] == "sample" and float(node["log_prob_sum"])
    }
    assert any(name.endswith("cooperation") for name in ratios)
    assert ratios == pytest.approx({name: 10.0 if name == "y" else 1.0 for name in ratios})


@pytest.mark.slow  # nine thousand steps each
@pytest.mark.parametrize("batch_size", [160, 144])
def test_no_variance_of_a_chain_of_chosen_steps_is_a_twentieth_too_large(batch_size: int) -> None:
    copies = 16  # in one chain, which count as so many
    known = lora_regression(n=10, columns=2, rank=1, noise=2.0, copies=copies)
    settings = {"warmup": 100, "draws": 800, "batch_size": batch_size, "progress": False}
    posterior = fit(known.program, known.rows, "sgld", **settings)
    assert isinstance(posterior, EmpiricalPosterior)
    variances, vectors = torch.linalg.eigh(known.covariance)
    draws = (posterior.chain[f"linear_{2 * copies}x1.A"].flatten(1).double() - known.mean) @ vectors
    for squares in (draws.square() / variances).unflatten(1, (2, copies)).unbind(1):  # each variance has its copies
        ess = sum(float(az.ess(each.numpy()[None], method="mean")) for each in squares.T)
        assert ess > 2 * (4 / 0.1) ** 2  # four standard errors of a variance are a tenth of it at most
        assert abs(float(squares.mean()) - 1.025) < 0.025 + 4 * math.sqrt(2 / ess)


@pytest.mark.parametrize("backend", ["sgld", "sghmc"])
def test_the_chosen_step_widens_no_eigenvector_by_more_than_the_bias(known: Regression, backend: str) -> None:
    settings = {"draws": 1, "warmup": 8, "thin": 1, "batch_size": 40}
    posterior = fit(known.program, known.rows, backend, progress=False, **settings)
    with isolated(0, torch.device("cpu")):
        h = posterior.record.history[0]["step_size"] * Unconstrained(known.program).spread()[SITE] ** 2
    precisions = 1 / torch.linalg.eigvalsh(known.covariance)
    # Along one of them theta' = (1 - h l / 2) theta + N(0, h), or with a momentum an autoregression of second order.
    ratios = 1 / (1 - h * precisions / (4 if backend == "sgld" else 4 - 2 * 0.1))
    assert 1 < float(ratios.min()) <= float(ratios.max()) == pytest.approx(1.05, abs=0.001)


def test_the_gradient_of_batches_is_that_of_all_rows(known: Regression) -> None:
    program, rows = known.program, known.rows
    with undisturbed(program), isolated(0, torch.device("cpu")):
        space = Unconstrained(program)
        place, spread, away = space.draw(), space.spread(), torch.tensor([0.5, -2.0])
        gradient = space.gradient_near(place, spread, len(rows))
        batches = [tiny_batch(program, rows.select(range(first, first + 10))) for first in range(0, 40, 10)]
        found = torch.stack([gradient(away, batch) for batch in batches]).mean(0).double()
    error = place[SITE].flatten().double() + spread[SITE] * away - known.mean
    expected = -spread[SITE] * torch.linalg.solve(known.covariance, error)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_step_is_by_a_batch_that_stands_for_all_rows(known: Regression, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, batches, places = known.rows.select(range(10)), [], []
    log_joint = Unconstrained.log_joint

    def told(space: Unconstrained, values: dict[str, Tensor], batch: dict[str, Tensor], size: int) -> Tensor:
        assert size == len(rows)
        batches.append(batch["labels"].tolist())
        places.append(values[SITE].detach().clone())
        return log_joint(space, values, batch, size)

    monkeypatch.setattr(Unconstrained, "log_joint", told)
    settings = {"draws": 3, "warmup": 1, "thin": 2, "batch_size": 4, "step_size": 0.1, "progress": False}
    posterior = fit(known.program, rows, "sgld", **settings)
    assert isinstance(posterior, EmpiricalPosterior)
    # Two whole batches of four in each pass over ten rows, and each pass in an order of its own.
    passes = [batches[number] + batches[number + 1] for number in range(0, 8, 2)]
    assert [len(set(each)) for each in passes] == [8] * 4
    assert len({tuple(each) for each in passes}) == 4
    # What is kept is where the chain is after every other step, once the two of the warm-up are made.
    assert torch.equal(posterior.chain[SITE][:2], torch.stack(places)[[4, 6]])


@pytest.mark.parametrize(("batch_size", "measured"), [(39, 8), (40, 1)])
def test_noise_is_measured_unless_a_batch_is_all_rows(
    known: Regression, batch_size: int, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, near = [], Unconstrained.gradient_near

    def gradient(space: Unconstrained, place: dict[str, Tensor], spread: dict[str, float], size: int) -> Gradient:
        seen.append(size)
        return near(space, place, spread, size)

    def stiffness(meter: Meter, batches: Sequence[object]) -> Stiffness:
        seen.append(len(batches))
        return Stiffness(1.0, 0.0)

    monkeypatch.setattr(Unconstrained, "gradient_near", gradient)
    monkeypatch.setattr(Meter, "__call__", stiffness)
    fit(known.program, known.rows, "sgld", draws=30, warmup=0, batch_size=batch_size, progress=False)
    assert seen == [40, measured]


def test_the_density_of_real_numbers_is_pyros() -> None:
    program, rows = tiny_program(MonteCLoRA(components=3)), tiny_rows(6)
    batch = tiny_batch(program, rows)
    with undisturbed(program), isolated(1, torch.device("cpu")):
        space = Unconstrained(program)
        values = space.draw()
        _, potential, _, _ = initialize_model(lambda: program(batch, 12))
        torch.testing.assert_close(space.log_joint(values, batch, 12), -potential(values))
    latents = space.constrained(values)
    assert {name for name in latents if name.endswith(("scale_tril", "mixture"))}
    for name, value in latents.items():
        assert value.shape == program.model.initial(program.sites)[name].shape


@pytest.mark.parametrize("backend", ["nuts", "sgld", "sghmc"])
def test_a_chain_comes_back_from_disk(backend: str, tmp_path: Path) -> None:
    program, rows = tiny_program(), tiny_rows(8)
    settings = {"draws": 5, "warmup": 2, "progress": False}
    state = torch.get_rng_state()
    posterior = fit(program, rows, backend, output_dir=tmp_path / "run", **settings)
    assert torch.equal(state, torch.get_rng_state())
    found = load(tmp_path / "run", program=program)
    assert found.record == posterior.record and found.record.finished
    (told,) = found.record.history
    names = {"acceptance", "divergences", "r_hat"} if backend == "nuts" else {"log_joint", "relaxations"}
    assert set(told) == {*names, "step_size"}
    expected = posterior.predict(rows, draws=5, progress=False).logits
    torch.testing.assert_close(found.predict(rows, draws=5, progress=False).logits, expected)
    again = fit(program, rows, backend, output_dir=tmp_path / "run", resume=True, **settings)
    assert again.record.cost == posterior.record.cost  # nothing was done again


def test_a_chain_is_loaded_to_the_device_of_its_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tiny_program(), tiny_rows(8), "sgld", draws=2, warmup=1, progress=False).save(tmp_path)
    # "meta" is a device that every machine has, but nothing can be computed there.
    monkeypatch.setattr(EmpiricalPosterior, "mean", lambda found: {s.name: s.initial for s in found.program.sites})
    found = load(tmp_path, program=tiny_program(), device="meta")
    assert isinstance(found, EmpiricalPosterior)
    assert {value.device.type for value in found.chain.values()} == {"meta"}


def test_draws_are_those_of_the_chain_in_order() -> None:
    posterior = fit(tiny_program(), tiny_rows(8), "sgld", draws=7, warmup=1, thin=1, progress=False)
    assert isinstance(posterior, EmpiricalPosterior)
    name = "linear_16x16.A"
    found = posterior.sample(4, seed=3)[name]
    torch.testing.assert_close(found, posterior.chain[name][[0, 2, 4, 6]])
    torch.testing.assert_close(posterior.mean()[name], posterior.chain[name].mean(0))
    with pytest.raises(PosteriorError, match="has 7 draws, and 8"):
        posterior.sample(8)
    with pytest.raises(PosteriorError, match="has no density"):
        posterior.log_prob(posterior.draw())


def test_a_step_that_is_too_long_is_an_error() -> None:
    with pytest.raises(TrainingError, match="step_size"):
        fit(tiny_program(), tiny_rows(8), "sgld", step_size=1e30, draws=20, progress=False)


@pytest.mark.parametrize("backend", ["sgld", "sghmc"])
def test_a_last_step_that_is_too_long_is_an_error(backend: str) -> None:
    with pytest.raises(TrainingError, match="draw is infinite or not a number.*step_size"):
        fit(tiny_program(), tiny_rows(8), backend, step_size=1e60, draws=1, warmup=0, thin=1, progress=False)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_prior_that_is_too_wide_to_start_from_is_said() -> None:
    program = tiny_program(Gaussian(sites="both", deviation=1e12, head_scale=1e12))
    with pytest.raises(TrainingError, match="narrower prior"):
        fit(program, tiny_rows(8), "nuts", draws=4, warmup=1, progress=False)


@pytest.mark.parametrize(
    ("backend", "settings", "message"),
    [
        ("nuts", {"draws": 0}, "draws should be greater than or equal to 4, found 0"),
        ("nuts", {"warmup": 0}, "warmup should be greater than or equal to 1, found 0"),
        ("nuts", {"max_tree_depth": 0}, "max_tree_depth"),
        ("nuts", {"target_accept": 1.0}, "target_accept"),
        ("sgld", {"warmup": -1}, "warmup"),
        ("sgld", {"step_size": 0.0}, "step_size"),
        ("sgld", {"thin": 0}, "thin"),
        ("sgld", {"batch_size": 0}, "batch_size"),
        ("sghmc", {"friction": 0.0}, "friction"),
        ("nuts", {"draws": 3}, "equal to 4, found 3"),
    ],
)
def test_mistakes(backend: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        fit(tiny_program(), tiny_rows(8), backend, progress=False, **settings)


def test_a_chain_over_text(tmp_path: Path) -> None:
    from scenarios import saved_base

    program = text_program(saved_base(tmp_path / "base"))
    fit(program, text_rows(), "sgld", draws=3, warmup=1, output_dir=tmp_path / "run", progress=False)
    found = load(tmp_path / "run")
    assert found.predict(text_rows(), draws=3, progress=False).draws == 3


@pytest.mark.parametrize("backend", ["nuts", "sgld", "sghmc"])
def test_dropout_is_off_while_a_chain_is_drawn(backend: str) -> None:
    chains = []
    for rate in (0.0, 0.5):
        program = tiny_program(dropout=rate).train()
        posterior = fit(program, tiny_rows(8), backend, draws=4, warmup=1, progress=False)
        assert program.network.training
        chains.append(posterior.chain["linear_16x16.A"])
    assert torch.equal(*chains)


def test_dropout_is_off_in_predictions() -> None:
    found = []
    for rate in (0.0, 0.5):
        program = tiny_program(dropout=rate)
        posterior = fit(program, tiny_rows(8), "sgld", draws=4, warmup=1, progress=False)
        program.network.train()
        found.append(posterior.predict(tiny_rows(8), draws=4, progress=False).logits)
        assert program.network.training
    assert torch.equal(*found)


def test_settings_of_nuts_reach_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(Exception):
        pass

    def told(*_: Any, **given: Any) -> None:
        raise Told(given)

    monkeypatch.setattr(nuts.mcmc, "NUTS", told)
    with pytest.raises(Told) as found:
        fit(
            tiny_program(), tiny_rows(8), "nuts", target_accept=0.7, max_tree_depth=3, dense_mass=True, progress=False
        )  # fmt: skip
    expected = {"target_accept_prob": 0.7, "max_tree_depth": 3, "full_mass": True}
    assert expected.items() <= found.value.args[0].items()
    start = fit(tiny_program(), tiny_rows(8), "mle", epochs=1, progress=False)
    with pytest.raises(Told) as found:
        fit(tiny_program(), tiny_rows(8), "nuts", start=start, progress=False)
    begun = found.value.args[0]["init_strategy"].keywords["values"]
    assert all(torch.equal(begun[name], value) for name, value in start.mean().items())


def test_too_many_weights_are_refused_before_a_chain_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"nuts would sample [\d,]+ weights: up to 1,024,000 passes .* over 8 rows"):
        fit(tiny_program(rank=64), tiny_rows(8), "nuts", progress=False)
    monkeypatch.setattr(nuts, "available", lambda device: 2**20)
    with pytest.raises(SettingError, match=r"0.0 GiB of 0.0 GiB that are free"):
        fit(tiny_program(), tiny_rows(8), "nuts", dense_mass=True, progress=False)
