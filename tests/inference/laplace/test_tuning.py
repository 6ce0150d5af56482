"""The prior that an evidence is largest for, or that predicts held-out rows best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from curvature_scenarios import EXACT, given, tiny
from scenarios import lora_regression, saved_base, text_program, text_rows, tiny_program, tiny_rows

from bayeslora.errors import DataError, SettingError, TrainingError
from bayeslora.inference import fit, load
from bayeslora.inference.laplace import intact
from bayeslora.inference.laplace.heldout import MULTIPLES
from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.models import Gaussian
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.temperature import best_temperature, weighed_temperature
from bayeslora.predict.values import ValuePrediction


def cost_of(temperature: float) -> float:
    """What the hyperprior asks for a temperature: deviations of its logarithm are 0.5 below one, and 1 above."""
    return (2 if temperature < 1 else 0.5) * math.log(temperature) ** 2


def test_the_tuned_scale_has_the_largest_exact_evidence() -> None:
    known = lora_regression(noise=2.0)
    posterior = fit(known.program, known.rows, "laplace", mode="map", curvature="full", tune="evidence", **EXACT)
    assert isinstance(posterior, LaplacePosterior)
    steps = [row for row in posterior.record.history if "tuning" in row]
    assert max(row["log_evidence"] for row in steps) == pytest.approx(posterior.log_evidence, abs=1e-6)
    assert posterior.log_evidence > steps[0]["log_evidence"]
    tuned = float(posterior.prior.roots["linear_3x1.A"][0, 0, 0])
    # Around the tuned scale the evidence falls to both sides: weights that are given need not be the mode.
    for factor in (0.9, 1.1):
        other = lora_regression(noise=2.0, prior=tuned * factor)
        assert other.log_evidence < posterior.log_evidence
    assert 0.1 < tuned < 10


@pytest.mark.parametrize("kind", ["full", "exact", "diag", "kron"])
def test_tuning_raises_the_evidence_by_one_number_for_all(kind: str) -> None:
    program, rows = tiny(), tiny_rows(12)
    fixed = given(program, rows, curvature=kind)
    tuned = given(program, rows, curvature=kind, tune="evidence")
    assert tuned.log_evidence > fixed.log_evidence + 1
    ratios = {name: tuned.prior.roots[name][:, 0, 0] / fixed.prior.roots[name][:, 0, 0] for name in tuned.prior.roots}
    assert len({round(float(value), 6) for each in ratios.values() for value in each}) == 1


def test_width_and_temperature_are_those_that_predict_held_out_rows_best() -> None:
    program, rows, heldout = tiny_program(Gaussian(zero_scale=1.0)), tiny_rows(48), tiny_rows(48, seed=5)
    trained = {"mode": "map", "epochs": 30, "batch_size": 16, "learning_rate": 1e-2, "cpu": True}
    plain = given(program, rows, **trained)
    tuned = given(program, rows, tune="heldout", heldout=heldout, **trained)
    trace = [row for row in tuned.record.history if "heldout_nll" in row]
    assert [row["multiple"] for row in trace] == pytest.approx(MULTIPLES.tolist())
    costs = [
        len(heldout) * row["tempered_nll"] + 2 * math.log(row["multiple"] / 0.3) ** 2 + cost_of(row["temperature"])
        for row in trace
    ]
    (best,) = (row for row in trace if row["chosen"])
    assert best is trace[min(range(len(costs)), key=costs.__getitem__)]
    assert MULTIPLES[0] < best["multiple"] < MULTIPLES[-1]
    assert abs(math.log(best["temperature"])) > 0.05
    for name, root in plain.prior.roots.items():
        assert float((tuned.prior.roots[name] / root)[0, 0, 0]) == pytest.approx(best["multiple"])
    assert tuned.predict(heldout, progress=False).metrics()["nll"].value == pytest.approx(
        best["tempered_nll"], rel=1e-5
    )
    assert f"T = {best['temperature']:.3g}" in repr(tuned)
    # Without the temperature the prediction is that of the width, and the mode is what it was.
    assert tuned.under(tuned.prior).predict(heldout, progress=False).metrics()["nll"].value == pytest.approx(
        best["heldout_nll"], rel=1e-5
    )
    modes = [each.predict(heldout, method="mean", progress=False).logits for each in (plain, tuned)]
    assert modes[0].equal(modes[1])
    # The width of the prior as it was is among those that were compared.
    (before,) = (row["heldout_nll"] for row in trace if row["multiple"] == pytest.approx(1.0))
    assert plain.predict(heldout, progress=False).metrics()["nll"].value == pytest.approx(before, rel=1e-5)
    assert best["tempered_nll"] < before


@pytest.mark.parametrize("right", [False, True])
def test_a_temperature_is_no_better_elsewhere(right: bool) -> None:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * (0.5 if right else 3)
    labels = logits.argmax(-1) if right else torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    found = ClassPrediction(logits.unsqueeze(0), labels)
    temperature, cost = weighed_temperature(found)

    def at(value: float) -> float:
        nll = torch.nn.functional.cross_entropy(logits.double() / value, labels, reduction="sum")
        return float(nll) + cost_of(value)

    assert (temperature < 0.5 if right else temperature > 2) and cost == pytest.approx(at(temperature))
    assert all(at(temperature * factor) > cost for factor in (0.98, 1.02))
    # The hyperprior keeps it nearer to one than the rows alone would.
    assert abs(math.log(temperature)) < abs(math.log(best_temperature(found)))


def test_width_and_temperature_of_real_labels() -> None:
    known = lora_regression(noise=0.1)  # a tenth of what the labels have
    heldout = known.rows.remove_columns("labels").add_column("labels", [2 * y for y in known.rows["labels"]])
    settings = {"mode": "map", "tune": "heldout", "heldout": heldout}
    found = fit(known.program, known.rows, "laplace", **settings, **EXACT)
    assert isinstance(found, LaplacePosterior)
    trace = [row for row in found.record.history if "multiple" in row]
    costs = [
        len(heldout) * row["tempered_nll"] + 2 * math.log(row["multiple"] / 0.3) ** 2 + cost_of(row["temperature"])
        for row in trace
    ]
    (best,) = (row for row in trace if row["chosen"])
    assert best is trace[min(range(len(costs)), key=costs.__getitem__)] and best["temperature"] > 2
    assert found.softening == pytest.approx(best["temperature"])
    made = found.predict(heldout, progress=False)
    assert isinstance(made, ValuePrediction) and made.stretch == pytest.approx(best["temperature"] ** 0.5)
    assert (
        made.metrics()["nll"].value == pytest.approx(best["tempered_nll"], rel=1e-5)
        and best["tempered_nll"] < best["heldout_nll"]
    )


@pytest.mark.parametrize(("number", "chosen"), [(30, "heldout"), (29, "")])
def test_held_out_rows_are_tuned_on_where_there_are_enough(number: int, chosen: str) -> None:
    program, rows, heldout = tiny_program(Gaussian(sites="both", zero_scale=1.0)), tiny_rows(12), tiny_rows(number)
    found = given(program, rows, tune="auto", heldout=heldout)
    expected = given(program, rows, tune=chosen or "auto", heldout=heldout if chosen else None)
    for name, root in expected.prior.roots.items():
        torch.testing.assert_close(found.prior.roots[name], root)
    assert [row for row in found.record.history if "heldout_nll" in row] or not chosen


@pytest.mark.parametrize("tune", ["none", "evidence", "mode-evidence"])
def test_held_out_rows_change_nothing_where_the_prior_is_tuned_without_them(tune: str) -> None:
    found, expected = (given(tiny(), tiny_rows(12), tune=tune, heldout=rows) for rows in (tiny_rows(30), None))
    assert found.softening is None and found.record.history == expected.record.history
    assert all(root.equal(expected.prior.roots[name]) for name, root in found.prior.roots.items())


def test_held_out_rows_must_be_given_before_anything_is_trained() -> None:
    with pytest.raises(SettingError, match="tune='heldout' needs rows to tune on"):
        given(tiny(), tiny_rows(6), tune="heldout")


def test_what_was_chosen_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = given(tiny(), tiny_rows(6), tune="heldout", heldout=tiny_rows(30), progress=True)
    (best,) = (row for row in found.record.history if row.get("chosen"))
    said = f"a prior {best['multiple']:.3g} times as wide, predictions at a temperature of {best['temperature']:.3g}."
    assert f"On 30 held-out rows laplace chose {said}" in capsys.readouterr().err


def test_held_out_rows_are_checked_like_others() -> None:
    with pytest.raises(DataError, match="has label 3"):
        given(tiny(), tiny_rows(6), tune="heldout", heldout=tiny_rows(30, classes=4))


def test_width_and_temperature_are_saved(tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"), Gaussian(sites="both"))
    settings = {"epochs": 2, "batch_size": 4, "tune": "heldout", "progress": False, "cpu": True}
    posterior = fit(program, text_rows(), "laplace", heldout=text_rows(16), output_dir=tmp_path / "run", **settings)
    assert isinstance(posterior, LaplacePosterior)
    assert posterior.softening not in (None, 1.0)
    found = load(tmp_path / "run").predict(text_rows(), progress=False)
    assert found.method == "tempered"
    assert found.logits.equal(posterior.predict(text_rows(), progress=False).logits)


def test_a_mode_that_has_no_loss_is_left_intact_by_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    program, rows = tiny_program(Gaussian(), targets=["query"]), tiny_rows(4)
    posterior = fit(program, rows, "laplace", tune="none", epochs=1, cpu=True, progress=False)
    monkeypatch.setattr(intact, "_loss", lambda *_: math.nan)
    with pytest.raises(TrainingError, match="loss at the mode is nan"):
        intact.intact_width(posterior, rows, 4, progress=False)
