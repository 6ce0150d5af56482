"""The prior's width by rows that were held out."""

from __future__ import annotations

from pathlib import Path

import pytest
from curvature_scenarios import given, tiny
from scenarios import saved_base, text_program, text_rows, tiny_program, tiny_rows

from bayeslora.errors import DataError, SettingError
from bayeslora.inference import fit, load
from bayeslora.inference.laplace.heldout import MULTIPLES
from bayeslora.models import Gaussian


def test_the_width_is_the_one_that_predicts_held_out_rows_best() -> None:
    program, rows, heldout = tiny_program(Gaussian(zero_scale=1.0)), tiny_rows(48), tiny_rows(48, seed=5)
    trained = {"mode": "train", "epochs": 30, "batch_size": 16, "learning_rate": 1e-2, "cpu": True}
    plain = given(program, rows, **trained)
    tuned = given(program, rows, tune="heldout", heldout=heldout, **trained)
    trace = [row for row in tuned.record.history if "heldout_nll" in row]
    assert [row["multiple"] for row in trace] == pytest.approx(MULTIPLES.tolist())
    best = min(trace, key=lambda row: row["heldout_nll"])
    assert MULTIPLES[0] < best["multiple"] < MULTIPLES[-1]
    for name, root in plain.prior.roots.items():
        assert float((tuned.prior.roots[name] / root)[0, 0, 0]) == pytest.approx(best["multiple"])
    assert tuned.predict(heldout, progress=False).metrics()["nll"].value == pytest.approx(best["heldout_nll"], rel=1e-5)
    # The width of the prior as it was is among those that were compared.
    (before,) = (row["heldout_nll"] for row in trace if row["multiple"] == pytest.approx(1.0))
    assert plain.predict(heldout, progress=False).metrics()["nll"].value == pytest.approx(before, rel=1e-5)
    assert best["heldout_nll"] < before


def test_held_out_rows_must_be_given_before_anything_is_trained() -> None:
    with pytest.raises(SettingError, match="tune='heldout' needs rows to tune on"):
        given(tiny(), tiny_rows(6), tune="heldout")


def test_held_out_rows_are_checked_like_others() -> None:
    with pytest.raises(DataError, match="has label 3"):
        given(tiny(), tiny_rows(6), tune="heldout", heldout=tiny_rows(30, classes=4))


def test_the_width_is_saved(tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"), Gaussian(sites="both"))
    settings = {"epochs": 2, "batch_size": 4, "tune": "heldout", "progress": False, "cpu": True}
    posterior = fit(program, text_rows(), "laplace", heldout=text_rows(16), output_dir=tmp_path / "run", **settings)
    found = load(tmp_path / "run").predict(text_rows(), progress=False)
    assert found.logits.equal(posterior.predict(text_rows(), progress=False).logits)
