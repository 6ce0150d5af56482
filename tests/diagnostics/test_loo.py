from __future__ import annotations

import warnings
from typing import Any

import arviz as az
import numpy as np
import pytest
import torch
import xarray as xr
from scenarios import Regression, linear_parts, lora_regression, tiny_program, tiny_rows

from bayeslora.diagnostics import khat, khat_by_block, layer_blocks, loo, versions
from bayeslora.errors import PosteriorError
from bayeslora.inference import fit
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.posterior import Posterior
from bayeslora.program import Program

EXACT = {
    "mode": "map", "curvature": "full", "tune": "none", "epochs": 250, "batch_size": 40, "learning_rate": 0.1,
    "schedule": "cosine", "warmup": 0.0, "max_grad_norm": 1e9, "progress": False,
}  # fmt: skip
DRAWS = 1000


@pytest.fixture(scope="module")
def known() -> Regression:
    return lora_regression(noise=2.0)


@pytest.fixture(scope="module")
def exact(known: Regression) -> Posterior:
    return fit(known.program, known.rows, "laplace", **EXACT)


@pytest.fixture(scope="module")
def drawn(known: Regression, exact: Posterior) -> Any:
    """Draws of the exact posterior, as data of arviz."""
    return exact.to_inference_data(known.rows, draws=DRAWS, prior_draws=0, progress=False)


def left_out(known: Regression, temperature: float = 1.0) -> np.ndarray:
    """Exact log density of each label given all others, from the joint normal law of all labels (noise 2, prior 1)."""
    labels = torch.tensor(known.rows["labels"], dtype=torch.float64)
    offset, design = linear_parts(known.program, known.rows)
    noise = 4.0 * temperature  # a power of a normal likelihood is one of another variance
    precision = torch.linalg.inv(design @ design.T + noise * torch.eye(len(labels), dtype=torch.float64))
    # Sundararajan and Keerthi, Neural Computation 2001: the variance is 1 / P_ii, the residual (P r)_i / P_ii.
    variance = 1 / precision.diagonal()
    residual = (precision @ (labels - offset)) * variance
    return torch.distributions.Normal(0.0, (variance - noise + 4.0).sqrt()).log_prob(residual).numpy()


def drawn_from_a_guide(known: Regression, factor: float, temperature: float, draws: int) -> Any:
    """Draws of a guide whose deviations are so many times those of the exact posterior, as data of arviz."""
    labels = torch.tensor(known.rows["labels"], dtype=torch.float64)
    offset, design = linear_parts(known.program, known.rows)
    precision = torch.eye(design.shape[1], dtype=torch.float64) + design.T @ design / (4.0 * temperature)
    mean = torch.linalg.solve(precision, design.T @ (labels - offset) / (4.0 * temperature))
    guide = torch.distributions.MultivariateNormal(mean, torch.linalg.inv(precision) * factor**2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = guide.sample((draws,))
    likelihood = torch.distributions.Normal(offset + values @ design.T, 2.0).log_prob(labels)
    log_p = likelihood.sum(1) / temperature + torch.distributions.Normal(0.0, 1.0).log_prob(values).sum(1)
    densities = {"log_p": log_p, "log_q": guide.log_prob(values)}
    stats = {name: (("chain", "draw"), value.numpy()[None]) for name, value in densities.items()}
    groups = {
        "sample_stats": xr.Dataset(stats),
        "log_likelihood": xr.Dataset({"y": (("chain", "draw", "example"), likelihood.numpy()[None])}),
    }
    return versions.join(groups, {"rows": "training", "draws_are": "independent", "temperature": temperature})


def pointwise(found: Any) -> np.ndarray:
    return found.loo_i.values if hasattr(found, "loo_i") else found.elpd_i.values


def test_leave_one_out_is_exact_where_the_posterior_is(known: Regression, drawn: Any) -> None:
    found = loo(drawn)
    expected = left_out(known)
    # Each is -log of a mean over draws of 1 / p(y_i), of which the relative deviation is below 1: 4 / sqrt(draws).
    np.testing.assert_allclose(pointwise(found), expected, rtol=0, atol=4 / DRAWS**0.5)
    assert found.se > abs(pointwise(found).sum() - expected.sum())
    assert float(found.pareto_k.max()) < 0.5


def shrunk(known: Regression, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Log density of the exact posterior, and of one whose deviations are so many times its own, at draws of that."""
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(known.covariance)
    noise = torch.randn(DRAWS, len(known.mean), generator=generator, dtype=torch.float64)
    draws = known.mean + factor * noise @ root.T
    p, q = (torch.distributions.MultivariateNormal(known.mean, scale_tril=scale * root) for scale in (1.0, factor))
    return p.log_prob(draws).numpy(), q.log_prob(draws).numpy()


def test_khat_tells_a_narrow_guide_from_the_posterior(known: Regression, drawn: Any) -> None:
    stats = drawn["sample_stats"]
    assert khat(stats["log_p"], stats["log_q"]) < 0.5
    # p / q of normal laws has a Pareto tail of shape 1 - factor^2 in each of the six directions.
    assert khat(*shrunk(known, 1.2)) < 0.5
    assert khat(*shrunk(known, 0.4)) > 0.7


def test_ratios_without_a_tail_are_not_trusted() -> None:
    weights, shapes = versions.psis(np.zeros((2, 100)))
    np.testing.assert_allclose(weights, -np.log(100))
    assert shapes.shape == (2,) and np.isinf(shapes).all()


@pytest.mark.parametrize(("factor", "temperature"), [(1.3, 1.0), (1.0, 3.0), (1.2, 0.5)])
def test_leave_one_out_corrects_for_a_guide_and_a_temperature(
    known: Regression, factor: float, temperature: float
) -> None:
    draws = 20_000
    found = pointwise(loo(drawn_from_a_guide(known, factor, temperature, draws)))
    # p / q has a mean square of (factor^2 / sqrt(2 factor^2 - 1))^6, at most 1.8, and so has the weight that leaves a
    # row out at these temperatures: the average over draws has a deviation of at most 1.8 / sqrt(draws) of it.
    np.testing.assert_allclose(found, left_out(known, temperature), rtol=0, atol=4 * 1.8 / draws**0.5)


def test_each_fit_is_left_out_by_itself(known: Regression) -> None:
    fits = [drawn_from_a_guide(known, factor, 1.0, DRAWS) for factor in (1.0, 1.2)]
    groups = {
        name: xr.concat(
            [each[name].to_dataset() if hasattr(each[name], "to_dataset") else each[name] for each in fits], "chain"
        )
        for name in ("sample_stats", "log_likelihood")
    }
    groups["sample_stats"]["log_p"] = groups["sample_stats"]["log_p"] + xr.DataArray([0.0, 50.0], dims="chain")
    both = loo(versions.join(groups, fits[0].attrs))
    one, other = (loo(each) for each in fits)
    # A fit whose point estimates make all labels e^50 times as likely counts for no more than the other.
    np.testing.assert_allclose(pointwise(both), np.logaddexp(pointwise(one), pointwise(other)) - np.log(2))
    np.testing.assert_array_equal(both.pareto_k.values, np.maximum(one.pareto_k.values, other.pareto_k.values))


def test_models_are_compared_by_arviz(known: Regression, drawn: Any) -> None:
    data = {"exact": drawn, "wide": drawn_from_a_guide(known, 1.2, 1.0, DRAWS)}
    assert set(az.compare({name: loo(each) for name, each in data.items()}).index) == set(data)


def test_blocks_are_the_layers_of_the_network() -> None:
    program = tiny_program()
    blocks = layer_blocks(program)
    assert [name for name in blocks][:2] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert sum(map(len, blocks.values())) == 13


def test_khat_by_block_sees_the_block_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    program, rows = tiny_program(targets=["query"]), tiny_rows(12)
    posterior = fit(program, rows, "svi", epochs=1, batch_size=4, progress=False)
    # Where the guide is the prior and says so, p / q is the likelihood: bounded. Here one layer's noise is cut.
    guide = posterior.guide.parts[0]
    with torch.no_grad():
        guide.log_eps[0] = -2.0
    layer = next(site for site in program.sites if site.role == "A").layers[0]
    other = next(site for site in program.sites if site.role == "A").layers[1]
    found = khat_by_block(posterior, rows, 200, blocks={"cut": {layer}, "whole": {other}}, progress=False)
    assert found["cut"] > 0.7 > found["whole"]


def around_the_exact_mean(known: Regression, flow: int | None) -> Posterior:
    """A guide of inducing values, wider than the posterior; with a flow, it is the identity."""
    model = Gaussian(centre="zero", scale=known.program.model.scale)
    program = Program(known.program.network, known.program.observation, model)  # B is a point, which stays
    rates = {"learning_rate": 1e-9, "scale_learning_rate": 0.0, "point_learning_rate": 0.0}
    guide = {"m": 3, "flow": flow, "sd": 0.95, "lam": 0.95, "explained": 0.7}
    with warnings.catch_warnings():  # of a fit that nothing was learned in
        warnings.simplefilter("ignore")
        posterior = fit(
            program, known.rows, "svi", guide="inducing", guide_settings=guide, prior_mean="model", heldout_size=0,
            epochs=1, progress=False, **rates,
        )  # fmt: skip
    (part,) = posterior.guide.parts[0].parts
    with torch.no_grad():
        part.mu.copy_(known.mean.reshape(part.mu.shape))
    return posterior


@pytest.mark.parametrize("flow", [None, 6])
def test_a_flow_is_diagnosed_by_the_weights_and_what_it_starts_from(known: Regression, flow: int | None) -> None:
    posterior, draws = around_the_exact_mean(known, flow), 150
    data = posterior.to_inference_data(known.rows, draws=draws, prior_draws=0, progress=False)
    stats = data["sample_stats"]
    ratios = np.exp(stats["elbo"].values.ravel() - known.log_evidence)
    # Four standard errors of a mean of the draws; and of weights that are as they are, for a row that is left out.
    error = 4 * ratios.std() / draws**0.5
    assert abs(ratios.mean() - 1) < error < 1
    np.testing.assert_allclose(pointwise(loo(data)), left_out(known), rtol=0, atol=error)
    whole = khat(stats["log_p"], stats["log_q"])
    assert whole < 0.5
    # One layer is all that is random.
    (found,) = khat_by_block(posterior, known.rows, draws, progress=False).values()
    assert found == pytest.approx(whole, abs=1e-3)


def test_khat_by_block_holds_what_the_flow_of_another_layer_starts_from() -> None:
    program, rows = tiny_program(Gaussian(), targets=["query"]), tiny_rows(12)
    guide = {"m": 3, "flow": 6}
    settings: dict[str, Any] = {"guide": "inducing", "guide_settings": guide, "epochs": 1, "batch_size": 4}
    posterior = fit(program, rows, "svi", progress=False, **settings)
    with torch.no_grad():
        posterior.guide.parts[0].parts[0].log_lam[0] = -2.0
    cut, whole = next(site for site in program.sites if site.role == "A").layers
    found = khat_by_block(posterior, rows, 100, blocks={"cut": {cut}, "whole": {whole}}, progress=False)
    assert found["cut"] > 0.7 > found["whole"]


def test_khat_by_block_is_of_the_tempered_posterior(known: Regression) -> None:
    cold = fit(known.program, known.rows, "laplace", **EXACT | {"temperature": 0.05, "curvature": "kron"})
    (found,) = khat_by_block(cold, known.rows, 200, progress=False).values()
    # p / q is a constant; without the temperature p is sqrt(20) times as wide as q, a tail of shape 1 - 1 / 20.
    assert found < 0.5


def test_the_rest_of_a_block_does_not_depend_on_random_numbers_before() -> None:
    program, rows = tiny_program(MonteCLoRA(components=3, collapse=False), targets=["query"]), tiny_rows(12)
    posterior = fit(program, rows, "svi", epochs=1, batch_size=4, progress=False)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(khat_by_block(posterior, rows, 30, progress=False))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


def test_mistakes_are_told() -> None:
    program, rows = tiny_program(), tiny_rows(12)
    points = fit(program, rows, "map", epochs=1, progress=False)
    with pytest.raises(PosteriorError, match="at least 30 draws, found 1"):
        loo(points.to_inference_data(rows, progress=False))
    with pytest.raises(PosteriorError, match="density under which layers are independent"):
        khat_by_block(points, rows)
    guide = fit(program, rows, "svi", epochs=1, progress=False)
    with pytest.raises(PosteriorError, match="rows that the posterior was fitted to"):
        loo(guide.to_inference_data(tiny_rows(5, seed=3), draws=30, progress=False))
    with pytest.raises(PosteriorError, match="k-hat by block needs the rows that it was fitted to"):
        khat_by_block(guide, tiny_rows(12, seed=3), 30, progress=False)
    with pytest.raises(PosteriorError, match="Unknown layer 'typo'"):
        khat_by_block(guide, rows, 30, blocks={"mine": {"typo"}}, progress=False)
    with pytest.raises(PosteriorError, match="at least 30 draws, found 10"):
        khat(np.zeros(10), np.zeros(10))
    with pytest.raises(PosteriorError, match="found 1 that are not numbers"):
        khat(np.array([np.nan] + [0.0] * 39), np.zeros(40))
