"""Draws in pairs: of the guide's law, two by two on opposite sides of its mean, and what averages gain by that."""

from __future__ import annotations

import pytest
import torch
from scenarios import tiny_program, tiny_rows

from bayeslora.errors import PosteriorError
from bayeslora.inference import fit
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models import Gaussian, MonteCLoRA, WeightModel

MODELS = [MonteCLoRA(), MonteCLoRA(collapse=False), Gaussian(), Gaussian(sites="both", noise="entry")]


def trained(model: WeightModel, **settings: object) -> VariationalPosterior:
    common = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 8, "progress": False}
    found = fit(tiny_program(model), tiny_rows(16), "svi", **common, **settings)
    assert isinstance(found, VariationalPosterior)
    return found


@pytest.mark.filterwarnings("ignore:The fit ends no better", "ignore:The bound still rises")
@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_every_second_draw_is_the_mirror_image_of_the_one_before(model: WeightModel) -> None:
    posterior = trained(model)
    found, draws, mean = list(posterior.pairs(5, seed=3)), list(posterior.draws(3, seed=3)), posterior.mean()
    assert len(found) == 5 and set(found[0]) == set(mean)
    random = {site.name for site in model.split(posterior.program.sites)[0]}
    for number, draw in enumerate(draws):
        assert all(found[2 * number][name].equal(draw[name]) for name in mean)
    for one, other in (found[:2], found[2:4]):
        for name in mean:
            torch.testing.assert_close(one[name] + other[name], 2 * mean[name], rtol=0, atol=1e-5)
            assert one[name].equal(other[name]) != (name in random)


@pytest.mark.filterwarnings("ignore:The fit ends no better", "ignore:The bound still rises")
@pytest.mark.parametrize("model", [model for model in MODELS if model != MonteCLoRA(collapse=False)], ids=repr)
def test_a_mirror_image_is_as_likely(model: WeightModel) -> None:
    posterior = trained(model)
    (draw,), (_, image) = list(posterior.draws(1, seed=3)), list(posterior.pairs(2, seed=3))
    # Mirroring keeps volumes, so that of equal densities it keeps the law.
    assert float(posterior.log_prob(draw | image)) == pytest.approx(float(posterior.log_prob(draw)), rel=1e-5)


@pytest.mark.filterwarnings("ignore:The fit ends no better", "ignore:The bound still rises")
def test_predictions_by_pairs_are_of_the_same_mean_and_more_precise() -> None:
    posterior, rows = trained(MonteCLoRA(scale=1.0)), tiny_rows(8, seed=1)

    def averages(method: str | None) -> torch.Tensor:
        seeds = (posterior.predict(rows, 4, method, seed=seed, progress=False) for seed in range(60))
        return torch.stack([each.probabilities.double() for each in seeds])

    pairs, sample = averages(None), averages("sample")
    assert posterior.predict(rows, 3, progress=False).method == "pairs"
    error = ((pairs.var(0) + sample.var(0)) / 60).sqrt()
    # Each of 24 differences is within four standard errors, but for one case in 700.
    assert ((pairs.mean(0) - sample.mean(0)).abs() < 4 * error).all()
    # A ratio of variances of 60 averages is within a factor of 1.7 of the true one, which is 0.2 here.
    assert pairs.var(0).mean() < 0.5 * sample.var(0).mean()


@pytest.mark.filterwarnings("ignore:The fit ends no better", "ignore:The bound still rises")
def test_independent_fits_have_pairs_of_their_own() -> None:
    posterior = fit(tiny_program(MonteCLoRA()), tiny_rows(16), "svi", epochs=1, batch_size=8, chains=2, progress=False)
    rows = tiny_rows(4)
    found = posterior.predict(rows, 4, seed=5, progress=False)
    apart = [
        chain.predict(rows, 2, "pairs", seed=5 + place, progress=False) for place, chain in enumerate(posterior.chains)
    ]
    expected = torch.stack([each.probabilities for each in apart]).mean(0)
    torch.testing.assert_close(found.probabilities, expected)


def test_a_point_has_no_pairs() -> None:
    posterior = fit(tiny_program(MonteCLoRA()), tiny_rows(16), "map", epochs=1, batch_size=8, progress=False)
    assert "pairs" not in posterior.predictors
    with pytest.raises(PosteriorError, match="pairs"):
        posterior.predict(tiny_rows(4), method="pairs", progress=False)
