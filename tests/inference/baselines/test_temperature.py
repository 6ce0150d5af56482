"""A temperature over other posteriors: which rows it is fitted on, what it changes, and that it is kept."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import saved_base, text_program, text_rows, tiny_program, tiny_rows, untrained_program

from bayeslora.diagnostics import khat_by_block
from bayeslora.errors import SettingError
from bayeslora.inference import Temperature, fit, load
from bayeslora.inference.base import Run
from bayeslora.inference.baselines.temperature import TemperedPosterior
from bayeslora.models import Gaussian
from bayeslora.observations import Value
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.temperature import best_temperature, tempered

OF: dict[str, Any] = {"epochs": 1, "batch_size": 8}
ROWS = tiny_rows(24)


def test_it_is_of_averaged_probabilities_on_rows_that_were_set_aside() -> None:
    here = untrained_program()
    settings: dict[str, Any] = {"of": "svi", "of_settings": OF | {"heldout_size": 0}, "draws": 3}
    posterior = fit(here, ROWS, "temperature", heldout_size=8, progress=False, **settings)
    assert isinstance(posterior, TemperedPosterior) and posterior.record.n_data == 16
    aside = ROWS.select(posterior.record.heldout)
    rest = ROWS.select(sorted(set(range(24)) - set(posterior.record.heldout)))
    plain = fit(here, rest, "svi", **OF, progress=False)
    assert len(aside) == 8
    by_hand = best_temperature(plain.predict(aside, 3, progress=False))
    assert float(posterior.by) == pytest.approx(by_hand, rel=1e-5) and by_hand != 1
    *log, gained = posterior.record.history
    assert log == posterior.inner.record.history != [] and gained["temperature"] == float(posterior.by)
    expected = tempered(plain.predict(ROWS, 4, seed=2, progress=False), by_hand)
    found = posterior.predict(ROWS, 4, seed=2, progress=False)
    assert found.method == "tempered"
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.mutual_information, expected.mutual_information, rtol=1e-3, atol=1e-6)
    untempered = posterior.predict(ROWS, 4, method="pairs", seed=2, progress=False)
    torch.testing.assert_close(untempered.outputs, plain.predict(ROWS, 4, seed=2, progress=False).outputs)
    assert torch.equal(found.predictions, untempered.predictions)
    # What is said of the weights is the other posterior's.
    draws = posterior.sample(2, seed=1)
    assert torch.equal(draws["linear_16x16.A"], plain.sample(2, seed=1)["linear_16x16.A"])
    data = posterior.to_inference_data(rest, draws=2, prior_draws=0, progress=False)
    assert data.attrs["method"] == "sample" and "log_p" in data["sample_stats"]


def test_it_is_of_the_method_that_is_asked_for() -> None:
    of = OF | {"heldout_size": 0, "learning_rate": 1e-2, "epochs": 3}
    settings: dict[str, Any] = {"of": "svi", "of_settings": of, "method": "mean", "heldout_size": 8}
    posterior = fit(untrained_program(), ROWS, "temperature", progress=False, **settings)
    assert isinstance(posterior, TemperedPosterior)
    inner, aside = posterior.inner, ROWS.select(posterior.record.heldout)
    mean = best_temperature(inner.predict(aside, method="mean", progress=False))
    assert float(posterior.by) == pytest.approx(mean, rel=1e-5)
    assert best_temperature(inner.predict(aside, progress=False)) != pytest.approx(mean, rel=1e-3)
    expected = tempered(inner.predict(ROWS, method="mean", progress=False), mean)
    found = posterior.predict(ROWS, progress=False)
    assert isinstance(expected, ClassPrediction) and isinstance(found, ClassPrediction)
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=1e-4, atol=1e-6)


def test_pairs_and_the_prior_are_those_of_the_other_posterior() -> None:
    settings = {"of_settings": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2}, "heldout_size": 8}
    posterior = fit(untrained_program(), ROWS, "temperature", of="svi", progress=False, **settings)
    for mine, other in zip(posterior.pairs(4, seed=2), posterior.inner.pairs(4, seed=2), strict=True):
        assert torch.equal(mine["linear_16x16.A"], other["linear_16x16.A"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mine = posterior.prior_draw()["linear_16x16.A"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(mine, posterior.inner.prior_draw()["linear_16x16.A"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(mine, posterior.program.prior()["linear_16x16.A"])  # its centre was learned


def test_a_flow_is_known_with_what_it_starts_from() -> None:
    of = OF | {"guide": "inducing", "guide_settings": {"m": 2, "flow": 4}, "heldout_size": 0}
    posterior = fit(untrained_program(), ROWS, "temperature", of="svi", of_settings=of, heldout_size=8, progress=False)
    rest = ROWS.select(sorted(set(range(24)) - set(posterior.record.heldout)))
    assert khat_by_block(posterior, rest, 30, progress=False) == khat_by_block(
        posterior.inner, rest, 30, progress=False
    )


@pytest.mark.filterwarnings("ignore:The chain ends")
def test_draws_of_a_chain_are_still_those_of_a_chain() -> None:
    chain = {"of": "sgld", "of_settings": {"draws": 4, "warmup": 1}, "heldout_size": 8, "draws": 2, "progress": False}
    posterior = fit(untrained_program(), ROWS, "temperature", **chain)
    data = posterior.to_inference_data(ROWS, draws=4, prior_draws=0, progress=False)
    assert data.attrs["draws_are"] == "a Markov chain"


def test_over_an_ensemble_of_laplaces(tmp_path: Path) -> None:
    base, rows = saved_base(tmp_path / "base"), text_rows(12)
    laplace = {"of": "laplace", "members": 2, "of_settings": {**OF, "tune": "none"}}
    settings = {"of": "ensemble", "of_settings": laplace, "output_dir": tmp_path / "run", "progress": False}
    posterior = fit(text_program(base, Gaussian(sites="both")), rows, "temperature", **settings)
    assert [each.inner.kind for each in posterior.chains] == ["laplace", "laplace"]
    assert len({float(each.by) for each in posterior.chains}) == 1
    found = posterior.predict(rows, progress=False)
    again = tempered(posterior.inner.predict(rows, progress=False), float(posterior.by))
    torch.testing.assert_close(found.probabilities, again.probabilities, rtol=1e-5, atol=1e-6)
    loaded = load(tmp_path / "run")
    assert torch.equal(loaded.predict(rows, progress=False).outputs, found.outputs)
    chain = posterior.chains[1]
    chain.save(tmp_path / "chain")
    alone = load(tmp_path / "chain").predict(rows, progress=False)
    assert alone.method == "tempered" and torch.equal(alone.outputs, chain.predict(rows, progress=False).outputs)
    shutil.rmtree(tmp_path / "run" / "posterior")  # stopped before the temperature was known
    resumed = fit(text_program(base, Gaussian(sites="both")), rows, "temperature", **settings, resume=True)
    assert torch.equal(resumed.predict(rows, progress=False).outputs, found.outputs)


@pytest.mark.parametrize(
    ("rows", "settings", "size"),
    [(9, {}, 4), (100, {}, 30), (5000, {}, 500), (20_000, {}, 1000), (100, {"heldout_size": 7}, 7)]
    + [(400, {"of": "laplace"}, 40), (400, {"of": "laplace", "of_settings": {"heldout_size": 50}}, 50)],
)
def test_how_many_rows_are_set_aside(rows: int, settings: dict[str, Any], size: int) -> None:
    assert Temperature(**settings).sets_aside(untrained_program(), rows, Run()) == size


def test_rows_that_were_given_are_taken() -> None:
    posterior = fit(
        untrained_program(), ROWS, "temperature", of_settings=OF, heldout=tiny_rows(8, seed=1), progress=False
    )
    assert posterior.record.n_data == 24 and not posterior.record.heldout and posterior.record.tuned_on


def test_around_weights_that_are_given() -> None:
    aside, here = tiny_rows(16, seed=1), untrained_program()
    plain = fit(here, ROWS, "mle", **OF, warmup=0.0, learning_rate=1e-2, progress=False)
    quick: dict[str, Any] = {"mode": "given", "start": plain, "progress": False}
    posterior = fit(here, ROWS, "temperature", heldout=aside, **quick)
    assert not posterior.inner.record.history  # nothing was trained
    assert torch.equal(posterior.mean()["linear_16x16.B"], plain.mean()["linear_16x16.B"])
    assert float(posterior.by) == pytest.approx(best_temperature(plain.predict(aside, progress=False)), rel=1e-5)
    with pytest.raises(SettingError, match="weights that were given may have seen them"):
        fit(here, ROWS, "temperature", **quick)


def test_rows_without_a_mistake_have_no_best_temperature_and_that_is_said() -> None:
    here = tiny_program(Gaussian())
    plain = {"mode": "given", "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(here, ROWS, "temperature", heldout=tiny_rows(16, seed=1), **plain)
    guesses = fit(here, ROWS, "temperature", heldout=ROWS, **plain).predict(ROWS, progress=False).predictions.tolist()
    right = ROWS.remove_columns("labels").add_column("labels", guesses)
    with pytest.warns(UserWarning, match="The 24 held-out rows have no best temperature, .* 0.05 is the last one"):
        fit(here, ROWS, "temperature", heldout=right, **plain)


def test_what_has_no_temperature() -> None:
    quick: dict[str, Any] = {"of_settings": OF, "progress": False}
    with pytest.raises(SettingError, match="weights that were given may have seen them"):
        fit(tiny_program(Gaussian()), ROWS, "temperature", **quick)  # its products B A are not zero
    with pytest.raises(SettingError, match="give only one of the two"):
        fit(untrained_program(), ROWS, "temperature", heldout=ROWS, heldout_size=3, **quick)
    with pytest.raises(SettingError, match="there are 24 rows: some must be left"):
        fit(untrained_program(), ROWS, "temperature", heldout_size=24, **quick)
    values = untrained_program()
    values.observation = Value()
    with pytest.raises(SettingError, match="'value' predicts none: choose 'mle' itself"):
        Temperature().sets_aside(values, 24, Run())
