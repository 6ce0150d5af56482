"""Training rows that a backend sets aside: which they are, and that nothing is trained on them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scenarios import awake, tiny_bert, tiny_rows

from bayeslora.diagnostics import to_inference_data
from bayeslora.errors import SettingError
from bayeslora.inference import aside, fit, load
from bayeslora.inference.aside import chose_on, stratified
from bayeslora.inference.base import Run
from bayeslora.inference.laplace import laplace
from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.models import Gaussian
from bayeslora.observations import Classes, digest
from bayeslora.program import Program

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16, "progress": False, "cpu": True}


def fresh() -> Program:
    """A program around an adapter that was not trained."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    return Program(get_peft_model(tiny_bert(), lora), Classes(3), Gaussian(sites="both", deviation=0.1))


def fitted(program: Program, rows: Dataset, **settings: Any) -> LaplacePosterior:
    posterior = fit(program, rows, "laplace", **QUICK | settings)
    assert isinstance(posterior, LaplacePosterior)
    return posterior


def tuned_on_rows(posterior: LaplacePosterior) -> bool:
    return any("heldout_nll" in row for row in posterior.record.history)


@pytest.mark.parametrize("size", [1, 7, 30, 99])
def test_each_class_has_its_share(size: int) -> None:
    labels = [0] * 70 + [1] * 20 + [2] * 10
    found = stratified(labels, size, seed=3)
    assert found == sorted(set(found)) and len(found) == size
    counts = Counter(labels[number] for number in found)
    assert all(abs(counts[label] - size * count / 100) <= 1 for label, count in Counter(labels).items())


def test_the_seed_chooses_and_texts_have_no_order() -> None:
    labels = [row % 3 for row in range(60)]
    assert stratified(labels, 10, 0) == stratified(labels, 10, 0) != stratified(labels, 10, 1)
    texts = [[row, 1] for row in range(60)]
    assert len(set(stratified(texts, 10, 0))) == 10 and stratified(texts, 10, 0) != stratified(texts, 10, 1)


def test_the_mode_is_that_of_the_rows_that_are_left_and_the_width_that_of_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, rows = fresh(), tiny_rows(48)
    posterior = fitted(program, rows, heldout_size=12, seed=5, progress=True)
    assert "12 of 48 training rows are set aside" in capsys.readouterr().err
    aside = posterior.record.heldout
    assert aside == stratified(rows["labels"][:], 12, 5) and posterior.record.n_data == 36
    left = rows.select([row for row in range(48) if row not in aside])
    assert posterior.record.data == digest(left)
    expected = fitted(program, left, heldout=rows.select(aside), tune="heldout", seed=5)
    assert all(torch.equal(value, posterior.mean()[name]) for name, value in expected.mean().items())
    for name, root in expected.prior.roots.items():
        assert torch.equal(posterior.prior.roots[name], root)


def test_a_tenth_is_set_aside_where_that_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laplace, "ENOUGH", 4)
    posterior = fitted(fresh(), tiny_rows(43))
    assert len(posterior.record.heldout) == 4 and tuned_on_rows(posterior)
    assert laplace.Laplace(tune="heldout").sets_aside(fresh(), 30, Run()) == 3
    for size, settings in ((39, {}), (43, {"heldout_size": 0}), (43, {"tune": "evidence"}), (43, {"mode": "given"})):
        posterior = fitted(fresh(), tiny_rows(size), **settings)
        assert not posterior.record.heldout and posterior.record.n_data == size and not tuned_on_rows(posterior)
    given = fitted(fresh(), tiny_rows(43), heldout=tiny_rows(8))
    assert not given.record.heldout and given.record.n_data == 43 and tuned_on_rows(given)
    monkeypatch.setattr(aside, "MOST", 5)
    assert len(fitted(fresh(), tiny_rows(60)).record.heldout) == 5


def test_nothing_is_set_aside_of_rows_that_a_mode_may_have_seen() -> None:
    program, rows = fresh(), tiny_rows(12)
    start = fit(program, rows, "mle", **QUICK)
    for given in ({"start": start}, {}):
        with pytest.raises(SettingError, match="weights that were given may have seen them"):
            fitted(program if given else awake(program), rows, heldout_size=4, **given)
    with pytest.raises(SettingError, match="give only one of the two"):
        fitted(program, rows, heldout_size=4, heldout=rows)
    with pytest.raises(SettingError, match="there are 12 rows"):
        fitted(program, rows, heldout_size=12)


@pytest.mark.parametrize("tune", ["none", "evidence", "mode-evidence"])
def test_nothing_is_set_aside_for_nothing(tune: Literal["none", "evidence", "mode-evidence"]) -> None:
    with pytest.raises(SettingError, match=f"heldout_size=4 sets .* aside .*, and tune='{tune}' tunes on none: leave"):
        fitted(fresh(), tiny_rows(12), heldout_size=4, tune=tune)
    assert laplace.Laplace(heldout_size=0, tune=tune).sets_aside(fresh(), 400, Run()) == 0


def test_a_resumed_fit_and_all_chains_have_the_same_rows_aside(tmp_path: Path) -> None:
    program, rows, settings = fresh(), tiny_rows(32), {"heldout_size": 8, "chains": 2}
    whole = fit(program, rows, "laplace", output_dir=tmp_path / "run", **QUICK, **settings)
    again = fit(program, rows, "laplace", output_dir=tmp_path / "run", resume=True, **QUICK, **settings)
    saved = load(tmp_path / "run", program=program)
    assert whole.record == again.record == saved.record
    assert whole.record.heldout == stratified(rows["labels"][:], 8, 0)
    assert all(member["heldout"] == whole.record.heldout for member in whole.record.members)


def test_leave_one_out_is_over_the_rows_that_were_trained_on() -> None:
    rows = tiny_rows(32)
    posterior = fitted(fresh(), rows, heldout_size=8)
    data = to_inference_data(posterior, rows, draws=2, prior_draws=0, progress=False)
    assert data.attrs["rows"] == "training" and data["log_likelihood"].sizes["example"] == 24
    other = to_inference_data(posterior, tiny_rows(32, seed=1), draws=2, prior_draws=0, progress=False)
    assert other.attrs["rows"] == "other"


@pytest.mark.parametrize("backend", ["svi", "laplace", "temperature", "tfb"])
def test_rows_that_something_was_chosen_on_are_known(backend: str) -> None:
    aside, others = tiny_rows(40, seed=1), tiny_rows(40, seed=2)
    settings = {"of_settings": {"epochs": 1}, "progress": False} if backend == "temperature" else QUICK
    posterior = fit(fresh(), tiny_rows(24), backend, heldout=aside, **settings)
    assert chose_on(posterior, aside) and not chose_on(posterior, others)
    assert not chose_on(posterior, aside.remove_columns("labels"))


def test_rows_that_nothing_was_chosen_on_are_like_any_others() -> None:
    aside = tiny_rows(40, seed=1)
    for backend, settings in (("mle", {}), ("svi", {"heldout_size": 0}), ("laplace", {"tune": "none"})):
        assert not chose_on(fit(fresh(), tiny_rows(24), backend, heldout=aside, **QUICK | settings), aside)
