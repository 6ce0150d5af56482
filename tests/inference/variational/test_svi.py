from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from elbo_scenarios import evidence_bound
from pyro import poutine
from scenarios import Regression, lora_regression, tiny_program, tiny_rows, untrained_program
from torch import Tensor
from torch.optim import Optimizer

from bayeslora.errors import SettingError
from bayeslora.inference import fit, load
from bayeslora.inference.training.objective import Objective, Outcome
from bayeslora.inference.training.trainer import train
from bayeslora.inference.variational import learning, svi
from bayeslora.inference.variational.svi import SVI
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.program import Program

#: One batch of all rows, a rate that falls to zero, and gradients as they are.
EXACT = {
    "batch_size": 40, "epochs": 500, "learning_rate": 0.05, "scale_learning_rate": 0.05, "schedule": "cosine",
    "warmup": 0.02, "max_grad_norm": 1e9, "log_every": 50, "progress": False, "prior_mean": "model",
}  # fmt: skip


@pytest.fixture(scope="module")
def known() -> Regression:
    return lora_regression(noise=2.0)


def test_the_full_guide_recovers_the_exact_posterior_and_evidence(known: Regression) -> None:
    posterior = fit(known.program, known.rows, guide="full", elbo="path", init_scale=0.6, **EXACT)
    law = posterior.guide.parts[0].auto.get_posterior()
    whitener = torch.linalg.inv(torch.linalg.cholesky(known.covariance))
    error = whitener @ (law.mean.detach() - known.mean)
    assert error.norm() < 0.05
    ratio = torch.linalg.eigvalsh(whitener @ law.covariance_matrix.detach().double() @ whitener.T)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=0.05)
    # The bound lies below the evidence by the divergence from the exact posterior.
    gap = float((ratio - 1 - ratio.log()).sum() + error.square().sum()) / 2
    found, standard_error = evidence_bound(posterior, known.rows)
    assert found == pytest.approx(known.log_evidence - gap, abs=4 * standard_error + 1e-3)
    assert gap < 0.01
    # `sample` has the same law: 400 draws have the mean to 3.5 standard errors in each of 6 directions.
    draws = posterior.sample(400)["linear_3x1.A"].flatten(1).double()
    z = (whitener @ (draws.mean(0) - law.mean.detach())) * math.sqrt(400)
    assert z.abs().max() < 3.5 * float(ratio.max().sqrt())


@pytest.mark.slow  # thousands of steps
def test_at_the_librarys_own_rates_the_full_guide_gets_there_as_well(known: Regression) -> None:
    settings = {"batch_size": 40, "log_every": 1000, "progress": False, "prior_mean": "model", "guide": "full"}
    with pytest.warns(UserWarning, match="The bound still rises"):
        fit(known.program, known.rows, elbo="path", epochs=2000, **settings)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        posterior = fit(known.program, known.rows, elbo="path", epochs=8000, **settings)
    assert not [each for each in said if "The bound still rises" in str(each.message)]
    law = posterior.guide.parts[0].auto.get_posterior()
    whitener = torch.linalg.inv(torch.linalg.cholesky(known.covariance))
    error = whitener @ (law.mean.detach() - known.mean)
    ratio = torch.linalg.eigvalsh(whitener @ law.covariance_matrix.detach().double() @ whitener.T)
    # Gradients of the path have no noise there, so that nothing but the number of steps keeps it from the posterior.
    assert float((ratio - 1 - ratio.log()).sum() + error.square().sum()) / 2 < 0.1  # nats below the evidence
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=0.05)


@pytest.mark.parametrize("estimator", ["draw", "local"])
def test_the_structured_guide_finds_the_best_bound_of_its_family(known: Regression, estimator: str) -> None:
    posterior = fit(known.program, known.rows, estimator=estimator, **EXACT)
    found, standard_error = evidence_bound(posterior, known.rows)
    # Noise of one scale for each direction of the rank cannot have the posterior's correlations between columns: the
    # closest such law has the variances columns / sum_i precision_ir, and its divergence is the distance of the bound.
    precision = torch.linalg.inv(known.covariance)
    by_direction = precision.diagonal().unflatten(0, (3, 2))
    variances = 3 / by_direction.sum(0)
    gap = float(-torch.logdet(precision) - 3 * variances.log().sum()) / 2
    assert gap > 0.5
    # Above by the Monte Carlo error alone; below, too, by where Adam stops, as with the full guide.
    assert found < known.log_evidence - gap + 4 * standard_error
    assert found > known.log_evidence - gap - 0.3 - 4 * standard_error


def learn(model: MonteCLoRA, rows: Dataset) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    program = tiny_program(model)
    posterior = fit(program, rows, epochs=3, batch_size=6, progress=False)
    start = model.guide(program.sites).state_dict()
    return start, posterior.state()


@pytest.mark.parametrize(
    "model", [MonteCLoRA(components=3), MonteCLoRA(components=3, wishart_on="precision", sites="both")]
)
def test_mean_wishart_and_dirichlet_have_all_moved(model: MonteCLoRA) -> None:
    start, end = learn(model, tiny_rows(12))
    names = [name for name in start if name.rsplit(".", 1)[-1] in ("mu", "log_v", "log_alpha") or "points" in name]
    assert len(names) > 6
    for name in names:
        moved = (end[name] - start[name]).abs().reshape(len(start[name]), -1)
        assert (moved > 1e-5).any(1).all(), name  # in every layer


def test_labels_decide_what_the_hyperparameters_become() -> None:
    rows = tiny_rows(12)
    flipped = rows.remove_columns("labels").add_column("labels", [2 - label for label in rows["labels"]])
    (_, one), (_, two) = learn(MonteCLoRA(components=3), rows), learn(MonteCLoRA(components=3), flipped)
    for name in one:
        if name.endswith(("mu", "log_v", "log_alpha")):
            assert not torch.allclose(one[name], two[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("guide", ["structured", "mean-field", "low-rank", "delta", "AutoNormal"])
@pytest.mark.parametrize("elbo", ["mean-field", "trace", "renyi"])
def test_every_guide_trains_under_every_bound(guide: str, elbo: str) -> None:
    posterior = fit(
        tiny_program(), tiny_rows(12), guide=guide, elbo=elbo, particles=2, epochs=1, batch_size=6, log_every=1,
        progress=False,
    )  # fmt: skip
    losses = [entry["loss"] for entry in posterior.record.history if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    draws = posterior.sample(2)
    same = {name for name, value in draws.items() if value[0].equal(value[1])}
    assert set(posterior.record.point_sites) == same
    draws = 1 if guide == "delta" else 2
    assert posterior.predict(tiny_rows(3), draws=2, progress=False).logits.shape == (draws, 3, 3)


def test_the_bound_rises_in_training() -> None:
    posterior = fit(
        tiny_program(),
        tiny_rows(24),
        epochs=40,
        batch_size=24,
        learning_rate=2e-2,
        noise_warmup=0.0,
        log_every=10,
        progress=False,
    )
    losses = [entry["loss"] for entry in posterior.record.history if "loss" in entry]
    # Each is the mean of ten steps; one step's noise is about 0.1 nats.
    assert losses[-1] < losses[0] - 0.2


def test_the_kl_weight_warms_up_to_the_temperature() -> None:
    posterior = fit(
        tiny_program(),
        tiny_rows(10),
        epochs=4,
        batch_size=5,
        kl_warmup=0.5,
        temperature=0.2,
        log_every=1,
        progress=False,
    )
    weights = [entry["kl_weight"] for entry in posterior.record.history if "loss" in entry]
    assert weights == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2])
    assert posterior.record.temperature == 0.2


def test_learned_prior_means_are_known_through_chains_and_a_temperature() -> None:
    rows = tiny_rows(12)
    settings: dict[str, Any] = {"epochs": 1, "progress": False}
    one = fit(tiny_program(), rows, chains=2, **settings)
    over = {"of": "svi", "of_settings": {"epochs": 1}, "heldout_size": 4, "progress": False}
    other = fit(untrained_program(), rows, "temperature", **over)
    random = {site.name for site in one.program.sites if site.role == "A"}
    assert set(one.learned_means) == set(one.chains[0].learned_means) == set(other.learned_means) == random
    assert not fit(tiny_program(), rows, prior_mean="model", **settings).learned_means


def test_a_matrix_around_a_learned_prior_mean_is_charged_for_its_noise_alone() -> None:
    costs = {}
    for prior_mean in ("learned", "model"):
        program = tiny_program(MonteCLoRA())
        settings = {"epochs": 8, "batch_size": 6, "learning_rate": 2e-3, "log_every": 1, "progress": False}
        posterior = fit(program, tiny_rows(12), prior_mean=prior_mean, **settings)
        name = next(site.name for site in program.sites if site.role == "A")
        assert not torch.allclose(posterior.mean()[name], program.model.initial(program.sites)[name], atol=1e-4)
        costs[prior_mean] = [entry for entry in posterior.record.history if "loss" in entry][-1][f"kl/{name}"]
    # Noise as large as the prior's costs nothing.
    assert abs(costs["learned"]) < 1e-6
    assert costs["model"] > 1e-3


def test_the_prior_of_a_posterior_is_the_one_that_was_learned(tmp_path: Path) -> None:
    program = tiny_program(Gaussian())
    name = next(site.name for site in program.sites if site.role == "A")
    posterior = fit(program, tiny_rows(12), epochs=4, batch_size=6, progress=False)
    posterior.save(tmp_path / "run")
    latents = program.model.initial(program.sites)
    moved = latents | posterior.mean()
    for each in (posterior, load(tmp_path / "run", program=tiny_program(Gaussian()))):
        # Its density is largest at the mean, as that of the program's own is where the program began.
        assert each.log_prior(moved)[name] > each.log_prior(latents)[name]
        assert torch.isclose(each.log_prior(moved)[name], _density(program, latents)[name])
    with torch.no_grad():
        draws = torch.stack([posterior.prior_draw()[name] for _ in range(400)])
    deviation = draws.std(0)
    z = (draws.mean(0) - posterior.mean()[name]) / deviation * math.sqrt(400)
    # A standard normal of each of some hundred entries: the largest stays below 5.
    assert z.abs().max() < 5


def _density(program: Program, latents: dict[str, Tensor]) -> dict[str, Tensor]:
    nodes = poutine.trace(poutine.condition(program.prior, data=latents)).get_trace().nodes
    return {name: node["fn"].log_prob(node["value"]).sum() for name, node in nodes.items() if node["type"] == "sample"}


def test_learning_rates_are_by_group() -> None:
    program: Program = tiny_program()
    start = program.model.guide(program.sites).state_dict()

    def moved(**rates: float | str | None) -> set[str]:
        rates = {"learning_rate": 1e-30, "scale_learning_rate": 0.0, "point_learning_rate": 0.0} | rates
        found = fit(program, tiny_rows(12), epochs=1, batch_size=6, warmup=0.0, progress=False, **rates).state()
        return {name.rpartition(".")[2] for name, value in found.items() if not torch.equal(value, start[name])}

    with pytest.warns(UserWarning, match="Nothing was learned of"):
        assert moved(scale_learning_rate=1e-2) == {"log_v", "log_alpha"}
    with pytest.warns(UserWarning, match="Nothing was learned of"):
        points = moved(point_learning_rate=1e-2)
    assert {name.rpartition("/")[2] for name in points} == {"B", "bias", "weight"}
    with pytest.warns(UserWarning, match="Nothing was learned of"):
        # They learn, however small the rate of A's mean is.
        assert moved(point_learning_rate=None, prior_mean="model") == points
    with pytest.warns(UserWarning, match="Nothing was learned of"):
        # So they do in two steps without a prior that holds it.
        assert moved(point_learning_rate=None) == points
    # The likelihood says nothing of A where B is zero.
    assert moved(point_learning_rate=1e-2, learning_rate=1e-2) == points | {"mu"}


def test_second_moments_are_kept_as_long_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Optimizer] = []

    def noted(objective: Objective, optimiser: Optimizer, *rest: Any) -> Outcome:
        seen.append(optimiser)
        return train(objective, optimiser, *rest)

    monkeypatch.setattr(learning, "train", noted)
    for settings in ({}, {"beta2": 0.7}):
        fit(tiny_program(), tiny_rows(6), epochs=1, progress=False, **settings)
    fit(tiny_program(), tiny_rows(6), "mle", epochs=1, progress=False)
    kept = [{group["betas"] for group in each.param_groups} for each in seen]
    assert kept == [{(0.9, 0.98)}, {(0.9, 0.7)}, {(0.9, 0.999)}]


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(SettingError, match="scale_learning_rate should be greater than or equal to 0, found -1"):
        SVI(scale_learning_rate=-1.0)


def test_unknown_bounds_and_no_particles_are_refused() -> None:
    with pytest.raises(SettingError, match="found 'reny'. Did you mean 'renyi'"):
        SVI(elbo="reny")
    with pytest.raises(SettingError, match="particles should be greater than or equal to 1, found 0"):
        SVI(particles=0)


def test_several_particles_with_activations_that_are_computed_again_are_refused() -> None:
    with pytest.raises(SettingError, match="gradient_checkpointing needs particles=1"):
        SVI(particles=2, gradient_checkpointing=True)
    assert SVI(gradient_checkpointing=True).particles == 1


def test_a_renyi_bound_of_one_particle_is_refused() -> None:
    with pytest.raises(SettingError, match="particles=2"):
        SVI(elbo="renyi")


@pytest.mark.parametrize("guide", ["full", "AutoMultivariateNormal"])
def test_too_little_memory_for_a_covariance_is_said_before_it_is_taken(
    guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svi, "available", lambda device: 2**20)
    monkeypatch.setattr(svi, "make_guide", lambda *_: pytest.fail("it was taken"))
    with pytest.raises(SettingError, match=r"A full covariance of [\d,]+ weights needs .* and 0.0 GiB are free"):
        fit(tiny_program(), tiny_rows(8), guide=guide, progress=False)
