from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pytest
import torch
from scenarios import lora_regression, tiny_program, tiny_rows, untrained_program

from bayeslora.diagnostics import read, write
from bayeslora.diagnostics.loo import loo
from bayeslora.diagnostics.summaries import summarise
from bayeslora.errors import PosteriorError
from bayeslora.inference import fit
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.posterior import Posterior
from bayeslora.sites import Site

ROWS = tiny_rows(16)
BACKENDS: dict[str, dict[str, Any]] = {
    "map": {"epochs": 1, "batch_size": 4},
    "svi": {"epochs": 1, "batch_size": 4},
    "laplace": {"mode": "map", "epochs": 1, "batch_size": 4},
    "sgld": {"draws": 20, "warmup": 1, "thin": 1},
    "nuts": {"draws": 20, "warmup": 2, "max_tree_depth": 2},
}


@cache
def fitted(backend: str, chains: int = 1) -> Posterior:
    """A posterior that no test changes."""
    program = tiny_program(Gaussian(deviation=0.1) if backend == "laplace" else MonteCLoRA(components=3))
    return fit(program, ROWS, backend, chains=chains, progress=False, **BACKENDS[backend])


def groups(data: Any) -> set[str]:
    return set(data.children) if hasattr(data, "children") else set(data.groups())


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_posterior_goes_to_disk_and_comes_back(backend: str, tmp_path: Path) -> None:
    posterior = fitted(backend, chains=2)
    found = posterior.to_inference_data(ROWS, draws=5, progress=False)
    draws = 1 if backend == "map" else 5
    assert dict(found["posterior_predictive"]["probabilities"].sizes) == {
        "chain": 2, "draw": draws, "example": 16, "class": 3,
    }  # fmt: skip
    expected = {"posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior", "prior_predictive"}
    expected |= {"observed_data", "constant_data"} | ({"log_prior"} if backend != "map" else set())
    assert groups(found) == expected
    write(found, tmp_path / "posterior.nc")
    again = read(tmp_path / "posterior.nc")
    assert groups(again) == expected and again.attrs == found.attrs
    for group in expected:
        for name, values in found[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name].values, values.values)
            assert again[group][name].dims == values.dims
    assert list(again["posterior"]["delta_layer"].values)[0].startswith("bert.encoder.layer.0.")
    assert {path.name for path in tmp_path.iterdir()} == {"posterior.nc"}


@pytest.mark.parametrize("backend", ["svi", "laplace", "sgld"])
def test_likelihoods_are_those_of_the_prediction(backend: str) -> None:
    posterior = fitted(backend)
    found = posterior.to_inference_data(ROWS, draws=4, prior_draws=0, seed=3, batch_size=5, progress=False)
    assert "prior" not in groups(found)
    method = next(name for name, each in posterior.predictors.items() if each.by_draws)
    prediction = posterior.predict(ROWS, draws=4, method=method, seed=3, progress=False)
    values = found["log_likelihood"]["y"].values[0]
    np.testing.assert_allclose(values, prediction.log_likelihood, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        found["posterior_predictive"]["probabilities"].values[0], prediction.logits.softmax(-1), rtol=0, atol=1e-5
    )
    np.testing.assert_array_equal(found["observed_data"]["y"].values, ROWS["labels"])
    draw = next(posterior.draws(4, 3))
    log_prior = {name: float(values.values[0, 0]) for name, values in found["log_prior"].data_vars.items()}
    assert log_prior == pytest.approx({name: float(value) for name, value in posterior.log_prior(draw).items()})
    log_p = float(found["sample_stats"]["log_p"].values[0, 0])
    assert log_p == pytest.approx(values[0].sum() + sum(log_prior.values()), abs=1e-3)
    assert ("log_q" in found["sample_stats"]) == posterior.dense


def test_of_other_rows_there_is_no_density_of_the_posterior() -> None:
    found = fitted("svi").to_inference_data(tiny_rows(7, seed=5), draws=3, progress=False)
    assert found.attrs["rows"] == "other"
    assert "log_p" not in found["sample_stats"] and "log_q" in found["sample_stats"]


def test_rows_keep_their_numbers_where_some_were_set_aside() -> None:
    posterior = fit(untrained_program(), ROWS, "svi", epochs=1, heldout_size=4, progress=False)
    data = posterior.to_inference_data(ROWS, draws=30, progress=False)
    kept = sorted(set(range(16)).difference(posterior.record.heldout))
    groups = ("log_likelihood", "observed_data", "posterior_predictive", "prior_predictive", "constant_data")
    assert all(data[group]["example"].values.tolist() == kept for group in groups)
    assert data["observed_data"]["y"].sel(example=kept[5]) == ROWS["labels"][kept[5]]
    assert loo(data).pareto_k["example"].values.tolist() == kept
    trained = ROWS.select(kept)
    assert posterior.to_inference_data(trained, draws=2, progress=False)["observed_data"]["example"].values[-1] == 11


def test_a_cold_posterior_has_a_tempered_density() -> None:
    program = tiny_program(MonteCLoRA(components=3))
    posterior = fit(program, ROWS, "svi", temperature=0.5, epochs=1, batch_size=4, progress=False)
    found = posterior.to_inference_data(ROWS, draws=3, prior_draws=0, progress=False)
    likelihood = found["log_likelihood"]["y"].sum("example")
    prior = sum(found["log_prior"].data_vars.values())
    np.testing.assert_allclose(found["sample_stats"]["log_p"], likelihood / 0.5 + prior, atol=1e-3)


def test_log_p_less_log_q_is_the_evidence_where_the_posterior_is_exact() -> None:
    known = lora_regression(noise=2.0)
    posterior = fit(
        known.program, known.rows, "laplace", mode="map", curvature="full", tune="none", epochs=250, batch_size=40,
        learning_rate=0.1, schedule="cosine", warmup=0.0, max_grad_norm=1e9, progress=False,
    )  # fmt: skip
    found = posterior.to_inference_data(known.rows, draws=20, progress=False)
    # What is left is the distance of the mode that training found, 1e-3 standard deviations.
    np.testing.assert_allclose(found["sample_stats"]["elbo"], known.log_evidence, rtol=0, atol=1e-2)
    assert (
        found["posterior_predictive"]["y"].values.std() > 0.5 and "probabilities" not in found["posterior_predictive"]
    )


def test_the_prior_of_laplace_is_the_one_that_was_tuned() -> None:
    posterior = fitted("laplace")
    name = "linear_16x16.A"
    centre = posterior.prior.centres[name]
    draws = torch.stack([posterior.prior_draw()[name] for _ in range(100)])
    root = float(posterior.prior.roots[name][0, 0, 0])
    # 28,800 numbers: the standard error of their deviation is 0.4 %.
    assert float((draws - centre).std()) == pytest.approx(root, rel=0.02)
    # Independent fits have each tuned a prior of their own.
    both = fitted("laplace", chains=2)
    drawn = both.to_inference_data(ROWS, draws=2, prior_draws=200, sites=[name], progress=False)["prior"][name]
    assert drawn.shape[:2] == (2, 100)
    for member, values in zip(both.chains, drawn.values, strict=True):
        spread = (values - member.prior.centres[name].numpy()).std()
        assert spread == pytest.approx(float(member.prior.roots[name][0, 0, 0]), rel=0.02)
    first = posterior.log_prior({**posterior.mean(), name: draws[0]})[name]
    expected = torch.distributions.Normal(0.0, root).log_prob((draws[0] - centre).double()).sum()
    assert float(first) == pytest.approx(float(expected), rel=1e-6)


def test_summaries_are_those_of_the_product() -> None:
    program = tiny_program(alpha=6)
    draw = {site.name: torch.randn_like(site.initial) for site in program.sites}
    found = summarise(draw, program.sites, ["head.classifier.weight"])
    a, b = draw["linear_16x24.A"], draw["linear_16x24.B"]
    names = found["delta.norm"].coordinates["delta_layer"]
    site = next(site for site in program.sites if site.name == "linear_16x24.A")
    for place, layer in enumerate(site.layers):
        product = 6 / 2 * b[place] @ a[place].T
        row = names.index(layer.removeprefix("base_model.model."))
        torch.testing.assert_close(found["delta.norm"].value[row].float(), product.norm())
        torch.testing.assert_close(found["delta.singular"].value[row].float(), torch.linalg.svdvals(product)[:2])
    torch.testing.assert_close(found["linear_16x24.A.rank_norm"].value[0], a[0].norm(dim=0))
    torch.testing.assert_close(found["linear_16x24.A.column_norm"].value[0], a[0].norm(dim=1))
    torch.testing.assert_close(found["head.classifier.weight"].value, draw["head.classifier.weight"])
    # A -> R A, B -> B R^-1 is another point of the same network.
    turn = torch.randn(2, 2) + 2 * torch.eye(2)
    turned = draw | {"linear_16x24.A": a @ turn.T, "linear_16x24.B": b @ torch.linalg.inv(turn)}
    torch.testing.assert_close(summarise(turned, program.sites)["delta.norm"].value, found["delta.norm"].value)


def test_singular_values_beyond_the_side_of_a_layer_are_zero() -> None:
    """Three of rank three, of one layer with two outputs and one with four."""
    wide, narrow = (
        [Site(f"{group}.{role}", role, group, torch.ones(1, size, 3), (f"{group}.layer",), (2.0,)) for role in "AB"]
        for group, size in (("wide", 4), ("narrow", 2))
    )
    draw = {site.name: torch.randn(site.initial.shape) for site in (*wide, *narrow)}
    found = summarise(draw, [*wide, *narrow])["delta.singular"].value
    for row, (a, b) in zip(found, (wide, narrow), strict=True):
        expected = torch.linalg.svdvals(2.0 * draw[b.name][0].double() @ draw[a.name][0].double().T)
        torch.testing.assert_close(row[: min(3, len(expected))], expected[:3])
        assert (row[len(expected) :] == 0).all()


def test_sites_that_are_named_are_kept_whole() -> None:
    posterior = fitted("svi")
    name = "linear_16x16.A.scale_tril"
    found = posterior.to_inference_data(ROWS, draws=3, sites=[name], progress=False)
    np.testing.assert_allclose(found["posterior"][name].values[0], posterior.sample(3)[name].numpy(), rtol=1e-6)
    assert found["prior"][name].shape == found["posterior"][name].shape


def test_a_summary_by_name_keeps_its_names() -> None:
    name = "linear_16x16.A.mixture"
    found = fitted("svi").to_inference_data(ROWS, draws=2, sites=[name], progress=False)["posterior"]
    assert found[name].dims[2:] == ("linear_16x16_layer", "linear_16x16.A_component")


def test_draws_of_prior_and_posterior_share_no_noise() -> None:
    name = "linear_16x16.A"
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = fitted("laplace").to_inference_data(ROWS, draws=20, sites=[name], progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    noise = [found[group][name].values - found[group][name].values.mean(1) for group in ("posterior", "prior")]
    # 5,760 pairs: the standard error of a correlation of 0 is 0.013.
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 4 * 0.013


def test_a_guide_without_density_has_draws() -> None:
    posterior = fit(
        tiny_program(Gaussian(deviation=0.1)), ROWS, "svi", guide="AutoIAFNormal", epochs=1, batch_size=4,
        progress=False,
    )  # fmt: skip
    assert not posterior.dense
    found = posterior.to_inference_data(ROWS, draws=3, progress=False)
    assert "log_q" not in found["sample_stats"] and "log_p" in found["sample_stats"]


def test_the_noise_of_a_guide_is_constant() -> None:
    posterior = fitted("svi", chains=2)
    found = posterior.to_inference_data(ROWS, draws=2, prior_draws=0, progress=False)["constant_data"]
    assert found["linear_16x16.A.eps"].shape == (2, 9, 1, 1) and float(found["linear_16x16.A.eps"].max()) == 1.0
    assert "linear_16x16.A.eps" not in fitted("map").to_inference_data(ROWS, progress=False)["constant_data"]


def test_mistakes_are_told() -> None:
    posterior = fitted("svi")
    with pytest.raises(PosteriorError, match=r"Unknown site 'linear_16x16.a'.*linear_16x16.A"):
        posterior.to_inference_data(ROWS, sites=["linear_16x16.a"], progress=False)
    with pytest.raises(PosteriorError, match="Unknown method of prediction 'men'. Did you mean 'mean'"):
        posterior.to_inference_data(ROWS, method="men", progress=False)


def test_a_method_without_draws_of_the_weights_gives_the_rest() -> None:
    posterior = fitted("laplace")
    found = posterior.to_inference_data(ROWS, method="probit", progress=False)
    assert not {"posterior", "log_prior"} & set(groups(found)) and "elbo" not in found["sample_stats"]
    assert found.attrs["draws_are"] == "passes of the network"
    values = posterior.predict(ROWS, method="probit", progress=False).log_likelihood
    np.testing.assert_array_equal(found["log_likelihood"]["y"].values[0], values)
    with pytest.raises(PosteriorError, match="Leave-one-out needs at least"):
        loo(found)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of few draws, and of labels that are discrete
def test_arviz_takes_every_posterior_as_it_is() -> None:
    found = {}
    for backend in ("svi", "laplace", "sgld", "nuts"):
        data = fitted(backend, chains=2).to_inference_data(ROWS, draws=20, prior_draws=5, progress=False)
        assert len(az.summary(data, var_names=["delta.norm"])) == 13
        az.plot_trace(data, var_names=["delta.norm"], coords={"delta_layer": data["posterior"]["delta_layer"][:1]})
        az.plot_forest(data, var_names=["delta.norm"])
        az.plot_ppc(data) if hasattr(az, "plot_ppc") else az.plot_ppc_dist(data, var_names=["y"])
        assert float(az.loo(data).se) > 0
        found[backend] = data
    assert set(az.compare(found).index) == set(found)
