"""The temperature of svi's predictions: the rows that it is chosen on, what it changes, and that it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scenarios import awake, saved_base, text_program, text_rows, tiny_bert, tiny_rows, untrained_program

from bayeslora.errors import SettingError
from bayeslora.inference import SVI, fit, load, softening
from bayeslora.inference.aside import chose_on
from bayeslora.inference.base import Run
from bayeslora.inference.baselines.temperature import TemperedPosterior
from bayeslora.inference.mixture import MixturePosterior
from bayeslora.inference.softening import BEYOND_CHANCE, Softened
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models import Gaussian
from bayeslora.observations import Completions, Value
from bayeslora.passes import Rows
from bayeslora.predict.prediction import Prediction
from bayeslora.predict.temperature import gain, tempered, weighed_temperature
from bayeslora.predict.values import ValuePrediction
from bayeslora.program import Program

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "progress": False, "cpu": True}
OF: dict[str, Any] = {"epochs": 1, "batch_size": 8}
ROWS = tiny_rows(24)


def fitted(rows: Dataset = ROWS, of: Program | None = None, **settings: Any) -> VariationalPosterior:
    posterior = fit(of or untrained_program(), rows, "svi", **QUICK | settings)
    assert isinstance(posterior, VariationalPosterior)
    return posterior


def test_it_is_of_averaged_probabilities_on_rows_that_were_set_aside() -> None:
    posterior = fitted(heldout_size=8, seed=3)
    assert posterior.record.n_data == 16 and len(posterior.record.heldout) == 8
    aside = ROWS.select(posterior.record.heldout)
    left = ROWS.select(sorted(set(range(24)) - set(posterior.record.heldout)))
    plain = fitted(left, seed=3)
    by_hand, _ = weighed_temperature(plain.predict(aside, 10, seed=3, progress=False))
    assert by_hand > 1
    assert posterior.softening == pytest.approx(by_hand, rel=1e-5) and abs(by_hand - 1) > 1e-3
    found = posterior.predict(ROWS, 4, seed=2, progress=False)
    expected = tempered(plain.predict(ROWS, 4, seed=2, progress=False), by_hand)
    assert found.method == "tempered"
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mutual_information, expected.mutual_information, rtol=1e-3, atol=1e-6)
    # All other ways to predict, and the weights, are without it.
    for method in ("pairs", "sample", "mean"):
        ours, theirs = (each.predict(ROWS, 4, method, seed=2, progress=False) for each in (posterior, plain))
        assert torch.equal(ours.outputs, theirs.outputs)
    assert all(torch.equal(value, plain.mean()[name]) for name, value in posterior.mean().items())
    assert repr(posterior).endswith(f", T = {by_hand:.3g})") and "T = " not in repr(plain)


@pytest.mark.parametrize(("rows", "surer"), [(4, False), (40, True)])
def test_only_rows_that_say_so_beyond_chance_make_it_surer_than_its_draws(rows: int, surer: bool) -> None:
    plain, aside = fitted(), tiny_rows(rows, seed=1)
    right = plain.predict(aside, 10, progress=False).predictions.tolist()
    aside = aside.remove_columns("labels").add_column("labels", right)
    posterior = fitted(heldout=aside)
    found = plain.predict(aside, 10, progress=False)
    best, _ = weighed_temperature(found)
    saved = gain(found, best)
    # Of rows that are all predicted right each adds to what a lower temperature gains.
    assert best < 0.95 and (rows * (saved["heldout_nll"] - saved["tempered_nll"]) > BEYOND_CHANCE) == surer
    assert posterior.softening == pytest.approx(best if surer else 1.0, rel=1e-5)
    if not surer:
        ours, theirs = (each.predict(ROWS, 4, progress=False) for each in (posterior, plain))
        torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=1e-6, atol=1e-7)


def test_its_record_says_what_it_gained() -> None:
    aside = tiny_rows(40, seed=1)
    posterior = fitted(heldout=aside)
    chosen = posterior.record.history[-1]
    assert chosen["temperature"] == posterior.softening and posterior.record.n_data == 24
    for name, method in (("heldout_nll", "pairs"), ("tempered_nll", "tempered")):
        nll = posterior.predict(aside, 10, method, progress=False).metrics()["nll"]
        assert chosen[name] == pytest.approx(nll.value, rel=1e-5)
    assert chosen["tempered_nll"] < chosen["heldout_nll"]


def test_a_tenth_is_set_aside_where_that_is_enough() -> None:
    fresh = untrained_program()
    sizes = {299: 0, 300: 30, 5000: 500, 20_000: 1000}
    assert {rows: SVI().sets_aside(fresh, rows, Run()) for rows in sizes} == sizes
    assert SVI(heldout_size=0).sets_aside(fresh, 5000, Run()) == 0
    assert SVI(heldout_size=7).sets_aside(fresh, 5000, Run()) == 7
    assert SVI().sets_aside(fresh, 5000, Run(heldout=ROWS)) == 0
    # Weights that are given may have seen all rows.
    assert SVI().sets_aside(fresh, 5000, Run(start={site.name: site.initial for site in fresh.sites})) == 0
    assert SVI().sets_aside(awake(fresh), 5000, Run()) == 0


def test_rows_that_are_given_are_taken_unless_none_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    few = tiny_rows(9, seed=1)
    posterior = fitted(heldout=few, progress=True)
    assert posterior.softening is not None and posterior.record.n_data == 24
    said = f"Predictions have a temperature of {posterior.softening:.3g}, by 9 held-out rows."
    assert said in capsys.readouterr().err
    without = fitted(heldout=few, heldout_size=0)
    assert without.softening is None and without.predict(ROWS, 2, progress=False).method == "pairs"


def valued(scale: float, n: int = 40) -> tuple[Program, Dataset]:
    """A program of real labels from 0 to 2 with noise of some deviation, and rows."""
    numbers = [float(row % 3) for row in range(n)]
    rows = tiny_rows(n).remove_columns("labels").add_column("labels", numbers)
    network = get_peft_model(tiny_bert(1), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    return Program(network, Value(scale), Gaussian()), rows


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_the_law_of_real_labels_is_stretched(scale: float, tmp_path: Path) -> None:
    of, rows = valued(scale)
    posterior = fitted(rows, of, heldout=rows)
    plain, found = (posterior.predict(rows, 6, method, seed=2, progress=False) for method in ("pairs", "tempered"))
    # Noise that is too small is made up for, and so is noise that is too large, by far beyond chance.
    assert posterior.softening is not None and (posterior.softening > 4) == (scale < 1)
    assert (posterior.softening < 0.1) == (scale > 1)
    assert isinstance(plain, ValuePrediction) and isinstance(found, ValuePrediction)
    torch.testing.assert_close(found.mean, plain.mean)
    torch.testing.assert_close(found.variance, posterior.softening * plain.variance)
    of_draws, _ = found.by_draw["mean"]
    torch.testing.assert_close(of_draws.std(0, correction=0).double(), found.disagreement, rtol=1e-3, atol=1e-6)
    posterior.save(tmp_path / "saved")
    again = load(tmp_path / "saved", program=of).predict(rows, 6, seed=2, progress=False)
    torch.testing.assert_close(again.log_predictive_density, found.log_predictive_density)
    found.save(tmp_path / "prediction")
    assert torch.equal(Prediction.load(tmp_path / "prediction").log_likelihood, found.log_likelihood)


def test_real_labels_of_several_fits_have_one_temperature() -> None:
    of, rows = valued(0.1)
    whole = fit(of, rows, "svi", heldout=rows, chains=2, **QUICK)
    assert isinstance(whole, MixturePosterior) and whole.softening is not None
    plain, found = (whole.predict(rows, 6, method, seed=2, progress=False) for method in ("pairs", "tempered"))
    assert isinstance(plain, ValuePrediction) and isinstance(found, ValuePrediction)
    torch.testing.assert_close(found.variance, whole.softening * plain.variance)
    assert whole.softening == pytest.approx(weighed_temperature(whole.predict(rows, 10, "pairs", progress=False))[0])


def test_choosing_again_takes_the_place_of_what_was_chosen() -> None:
    posterior = fitted(heldout=tiny_rows(9, seed=1))
    untempered = posterior.predict(ROWS, 4, "pairs", progress=False)
    posterior.soften(3.0)
    found = posterior.predict(ROWS, 4, progress=False).probabilities
    torch.testing.assert_close(found, tempered(untempered, 3.0).probabilities)


def test_what_it_took_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, clock = fitted(), iter([100.0, 104.0])
    monkeypatch.setattr(softening.time, "monotonic", lambda: next(clock))
    before = posterior.cost["seconds"]
    softening.soften(posterior, Run(heldout=tiny_rows(9, seed=1), progress=False))
    assert posterior.cost["seconds"] == pytest.approx(before + 4)


def test_rows_are_predicted_in_batches_that_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted(batch_size=3)
    seen = []
    monkeypatch.setattr(Rows, "of", lambda program, data, batch_size, progress: seen.append(batch_size) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        softening.soften(posterior, Run(heldout=tiny_rows(9, seed=1), progress=False))
    assert seen == [3]


def test_what_cannot_be_set_aside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = untrained_program()
    with pytest.raises(SettingError, match="give only one of the two"):
        fitted(heldout_size=4, heldout=ROWS)
    with pytest.raises(SettingError, match="weights that were given may have seen them"):
        fitted(of=awake(fresh), heldout_size=4)
    with pytest.raises(SettingError, match="there are 24 rows"):
        fitted(heldout_size=24)
    monkeypatch.setattr(fresh, "observation", Completions())
    assert SVI().sets_aside(fresh, 5000, Run()) == 0 and not SVI()._softens(fresh, Run(heldout=ROWS))
    with pytest.raises(SettingError, match="'completions' predicts neither: leave heldout_size out"):
        SVI(heldout_size=4).sets_aside(fresh, 5000, Run())


def test_it_is_kept_and_a_resumed_fit_and_all_chains_have_the_same_rows_aside(tmp_path: Path) -> None:
    base, rows = saved_base(tmp_path / "base"), text_rows(24)
    settings: dict[str, Any] = {"heldout_size": 6, "chains": 2, "output_dir": tmp_path / "run"}
    whole = fit(text_program(base, Gaussian()), rows, "svi", **QUICK, **settings)
    again = fit(text_program(base, Gaussian()), rows, "svi", resume=True, **QUICK, **settings)
    loaded = load(tmp_path / "run")
    assert whole.record == again.record == loaded.record
    for each in (again, loaded):
        assert isinstance(each, MixturePosterior) and each.softening == whole.softening
        assert [chain.softening for chain in each.chains] == [chain.softening for chain in whole.chains]
    found = whole.predict(rows, 4, progress=False)
    assert found.method == "tempered"
    torch.testing.assert_close(loaded.predict(rows, 4, progress=False).outputs, found.outputs)


@pytest.mark.parametrize(("backend", "rows"), [("svi", 4), ("laplace", 40)])  # so few cannot speak beyond chance
def test_fits_together_are_no_surer_than_their_noise_where_one_is_not(backend: str, rows: int) -> None:
    aside = tiny_rows(rows, seed=1)
    mode = fit(untrained_program(), ROWS, backend, heldout=aside, heldout_size=0, **QUICK)
    right = mode.predict(aside, method="mean", progress=False).predictions.tolist()
    aside = aside.remove_columns("labels").add_column("labels", right)
    one = fit(untrained_program(), ROWS, backend, heldout=aside, **QUICK)
    two = fit(untrained_program(), ROWS, backend, heldout=aside, chains=2, **QUICK)
    for each in (one, two):
        assert isinstance(each, Softened) and each.softening is not None
        assert each.softening == 1 if backend == "svi" else each.softening < 0.9


@pytest.mark.parametrize("backend", ["svi", "ensemble"])
def test_fits_have_one_temperature_together(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each fit asks for a temperature of its own, and both together for another.
    temperatures = iter([2.0, 3.0, 1.5])
    monkeypatch.setattr(softening, "weighed_temperature", lambda found: (next(temperatures), 0.0))
    aside = tiny_rows(9, seed=1)
    if backend == "svi":
        whole = fit(untrained_program(), ROWS, "svi", heldout=aside, chains=2, **QUICK)
    else:
        whole = fit(
            untrained_program(), ROWS, "ensemble", of="svi", members=2, of_settings=OF, heldout=aside, progress=False
        )
    assert isinstance(whole, MixturePosterior) and whole.softening == 1.5
    assert [chain.softening for chain in whole.chains] == [2.0, 3.0]
    together = whole.predict(ROWS, 4, "pairs", progress=False)
    assert together.draws == 4
    found = whole.predict(ROWS, 4, progress=False)
    assert found.method == "tempered" and found.draws == found.metrics().draws == 4
    torch.testing.assert_close(found.probabilities, tempered(together, 1.5).probabilities)
    data = whole.to_inference_data(ROWS, draws=4, method="tempered", prior_draws=0, progress=False)
    assert data["posterior_predictive"].sizes["draw"] == data["sample_stats"].sizes["draw"] == 1
    assert chose_on(whole, aside) and not chose_on(whole, ROWS)


def test_a_temperature_over_it_is_of_what_it_predicts() -> None:
    aside = tiny_rows(40, seed=1)
    over = fit(untrained_program(), ROWS, "temperature", of="svi", of_settings=OF, heldout=aside, progress=False)
    assert isinstance(over, TemperedPosterior) and isinstance(over.inner, VariationalPosterior)
    inner = over.inner.predict(ROWS, 4, progress=False)
    assert inner.method == "tempered" and abs(float(over.by) - 1) > 1e-3
    expected, found = tempered(inner, float(over.by)), over.predict(ROWS, 4, progress=False)
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    assert found.draws == inner.draws == 4
    plain = OF | {"heldout_size": 0}
    two = fit(
        untrained_program(), ROWS, "temperature", of="svi", of_settings=plain, heldout=aside, chains=2, progress=False
    ).predict(ROWS, 4, progress=False)
    assert (len(two.outputs), two.draws, two.metrics().draws) == (2, 4, 4)
