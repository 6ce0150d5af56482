from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from causal_scenarios import causal_base
from datasets import Dataset
from peft import LoraConfig
from scenarios import lora_regression, saved_base, text_program, text_rows

from bayeslora.diagnostics import diagnose, khat, of_values, plots, read, report, token_calibration
from bayeslora.diagnostics.diagnosis import listed
from bayeslora.errors import DataError, PosteriorError
from bayeslora.inference import fit
from bayeslora.models import Gaussian
from bayeslora.posterior import Posterior
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.resampling import Interval
from bayeslora.predict.selective import auroc
from bayeslora.predict.sequences import SequencePrediction
from bayeslora.predict.values import ValuePrediction
from bayeslora.program import Program
from bayeslora.tasks import Split, Task, TaskSpec

SETTINGS: dict[str, dict[str, Any]] = {
    "map": {"epochs": 2, "batch_size": 4},
    "svi": {"epochs": 8, "batch_size": 4, "log_every": 1},
    "laplace": {"epochs": 2, "batch_size": 4},
    "sgld": {"draws": 30, "warmup": 1, "thin": 1},
}


@pytest.mark.parametrize("backend", SETTINGS)
def test_a_diagnosis_of_every_posterior(backend: str, tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"), Gaussian(deviation=0.1))
    rows = text_rows(12)
    posterior = fit(program, rows, backend, progress=False, **SETTINGS[backend])
    found = diagnose(posterior, text_rows(9), rows, text_rows(7), draws=35, progress=False)
    found.save(tmp_path / "out", "of a test")
    text = (tmp_path / "out" / "diagnosis.md").read_text()
    figures = json.loads((tmp_path / "out" / "diagnosis.json").read_text(), parse_constant=pytest.fail)
    assert text.startswith("# of a test\n") and "What are the probabilities worth?" in text
    assert {"accuracy", "nll", "ece_15", "aurc", "auroc_entropy", "prior_confidence"} <= set(figures)
    assert f"which would be {figures['ece_15_by_chance']:.3f} by chance alone" in text
    random, dense = backend != "map", backend in ("svi", "laplace")
    assert ("khat" in figures) == dense and ("elpd_loo" in figures) == random
    assert ("rhat_largest" in figures) == (backend == "sgld")
    assert ("rests at the end" in text or "still falls" in text or "rises" in text) == (backend == "svi")
    assert ("given its point estimates" in text) == dense and ("linear network" in text) == (backend == "laplace")
    assert ("are effective for every probability" in text) == (backend == "sgld")
    assert ("This is optimistic: point estimates of" in text) == dense
    learned = f"prior means of {', '.join(posterior.learned_means[:3])}"
    assert (learned in text) == ("it compares with such fits alone" in text) == (backend == "svi")
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures == set(found.pictures) and all(f"![{name}]({name}.png)" in text for name in pictures)
    assert {"reliability", "classes", "risk", "uncertainty", "shift", "prior_predictive"} <= pictures
    assert read(tmp_path / "out" / "posterior.nc").attrs["backend"] == backend


def test_a_markov_posterior_that_logged_nothing(tmp_path: Path) -> None:
    program, rows = text_program(saved_base(tmp_path / "base")), text_rows(12)
    posterior = fit(program, rows, "sgld", progress=False, **SETTINGS["sgld"])
    posterior.record = replace(posterior.record, history=[])  # as one's own backend may leave it
    assert "ess_least" in diagnose(posterior, text_rows(9), rows, draws=30, progress=False).figures


def test_labels_are_asked_for_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, rows = text_program(saved_base(tmp_path / "base")), text_rows(12)
    posterior = fit(program, rows, "map", progress=False, epochs=1)
    monkeypatch.setattr(report, "to_inference_data", lambda *_: pytest.fail("passes were made"))
    unlabelled = Split(rows.dataset.remove_columns("label"), rows.spec, "new")
    with pytest.raises(DataError, match="the rows of 'new' have none"):
        diagnose(posterior, unlabelled, progress=False)


def test_without_the_training_rows(tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"))
    posterior = fit(program, text_rows(12), "svi", progress=False, epochs=1)
    found = diagnose(posterior, text_rows(9), draws=30, progress=False)
    sentences = [sentence for sentences in found.verdicts.values() for sentence in sentences]
    assert "k-hat is left out: the training rows are not there." in sentences
    assert any("Leave-one-out is left out" in sentence for sentence in sentences)


def test_other_rows_than_those_that_were_fitted(tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"))
    posterior = fit(program, text_rows(12), "svi", progress=False, epochs=1)
    found = diagnose(posterior, text_rows(9), text_rows(10), draws=30, progress=False)
    sentences = [sentence for sentences in found.verdicts.values() for sentence in sentences]
    assert "k-hat is left out: these are not the rows that it was fitted to." in sentences


def test_noise_that_depends_on_the_input_is_said_to_be_no_draws_of_the_weights(tmp_path: Path) -> None:
    program, rows = text_program(saved_base(tmp_path / "base"), Gaussian()), text_rows(12)
    posterior = fit(program, rows, "c-lora", progress=False, epochs=1)
    found = diagnose(posterior, text_rows(9), rows, draws=30, progress=False)
    sentences = [sentence for sentences in found.verdicts.values() for sentence in sentences]
    assert "k-hat is left out: its predictions are not draws of the weights." in sentences
    assert "khat" not in found.figures and "elpd_loo" not in found.figures


def test_fits_are_judged_each_by_itself(tmp_path: Path) -> None:
    program, rows = text_program(saved_base(tmp_path / "base")), text_rows(12)
    posterior = fit(program, rows, "svi", chains=2, progress=False, epochs=8, batch_size=4, log_every=1)
    found = diagnose(posterior, rows, rows, draws=30, block_draws=30, progress=False)
    text = found.markdown("two fits")
    assert "The loss of chain 0" in text and "The loss of chain 1" in text
    assert "k-hat of one layer at a time of the first fit" in text
    assert 0 <= found.figures["rhat_above_by_chance"] <= 1 and "by chance, with the draws of all fits shuffled" in text
    few = diagnose(posterior, rows, rows, draws=10, block_draws=10, progress=False).markdown("few draws")
    assert "k-hat is left out. k-hat needs at least 30 draws, found 10." in few


def test_figures_are_those_of_all_fits_and_of_the_rows_that_are_reported(tmp_path: Path) -> None:
    program, train = text_program(saved_base(tmp_path / "base")), text_rows(12)
    rows, other = text_rows(10), text_rows(7)
    posterior = fit(program, train, "svi", chains=2, progress=False, epochs=2, learning_rate=1e-2)
    found = diagnose(posterior, rows, train, other, draws=30, progress=False)
    figures, stats = found.figures, found.data["sample_stats"]
    shapes = [khat(*pair) for pair in zip(stats["log_p"].values, stats["log_q"].values, strict=True)]
    assert figures["khat"] == max(shapes) > min(shapes)
    elbo = stats["elbo"].values.ravel()
    assert len(elbo) == 60 and figures["elbo"] == pytest.approx(elbo.mean())
    assert figures["elbo_error"] == pytest.approx(elbo.std(ddof=1) / 60**0.5)
    own, shifted = (posterior.predict(each, 30, progress=False) for each in (rows, other))
    assert isinstance(own, ClassPrediction) and isinstance(shifted, ClassPrediction) and own.labels is not None
    wrong = own.predictions.ne(own.labels)[own.probabilities.amax(-1).argsort(descending=True)].double()
    assert figures["risk_80"] == pytest.approx(float(wrong[:8].mean()))
    assert figures["auroc_entropy"] == pytest.approx(auroc(own.entropy, shifted.entropy))
    assert figures["auroc_information"] == pytest.approx(auroc(own.mutual_information, shifted.mutual_information))


def test_what_few_draws_leave_out_is_said_before_any_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def passes(*args: Any, **settings: Any) -> Any:
        raise InterruptedError

    program, rows = text_program(saved_base(tmp_path / "base")), text_rows(12)
    posterior, point = (fit(program, rows, backend, progress=False, epochs=1) for backend in ("svi", "map"))
    monkeypatch.setattr("bayeslora.diagnostics.report.to_inference_data", passes)
    for each, draws, said in ((posterior, 10, True), (posterior, 30, False), (point, 10, False)):
        with pytest.raises(InterruptedError):
            diagnose(each, rows, rows, draws=draws)
        assert ("With 10 draws of each chain, k-hat, leave-one-out and R-hat" in capsys.readouterr().err) == said


def test_what_is_known_with_auxiliary_values_alone_is_said(tmp_path: Path) -> None:
    program, rows = text_program(saved_base(tmp_path / "base"), Gaussian(deviation=0.1)), text_rows(12)
    for flow in (None, 4):
        settings: dict[str, Any] = {"guide": "inducing", "guide_settings": {"m": 2, "flow": flow}, "epochs": 1}
        found = diagnose(
            fit(program, rows, "svi", chains=2, progress=False, **settings), rows, rows, draws=30, progress=False
        )
        assert {"khat", "elpd_loo"} <= found.figures.keys()
        text = found.markdown("inducing values")
        assert ("are by p / q of both jointly, which varies more" in text) == (flow is not None)


def test_layers_that_are_not_independent(tmp_path: Path) -> None:
    program, rows = text_program(saved_base(tmp_path / "base"), Gaussian(deviation=0.1)), text_rows(12)
    posterior = fit(program, rows, "svi", guide="low-rank", progress=False, epochs=1)
    text = diagnose(posterior, rows, rows, draws=30, block_draws=30, progress=False).markdown("one matrix")
    assert "k-hat by layer is left out: under this posterior layers are not independent." in text


def test_blocks_when_asked_for(tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"))
    rows = text_rows(12)
    posterior = fit(program, rows, "svi", progress=False, epochs=1)
    found = diagnose(posterior, rows, rows, draws=30, block_draws=30, progress=False)
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1"} <= set(found.figures["khat_by_block"])


WORDS = ["sun", "moon", "water", "stone"]
CAUSAL: dict[str, tuple[TaskSpec, dict[str, list[Any]]]] = {
    "completions": (
        TaskSpec("pairs", "completion", ("prompt",), completion="completion"),
        {"prompt": [f"Question: what is {word}" for word in WORDS], "completion": [f" {word}" for word in WORDS]},
    ),
    "text-choices": (
        TaskSpec("quiz", "multiple-choice", ("text",), "label", ("A", "B", "C"), choices=("choices",)),
        {"text": WORDS, "choices": [["yes", "it is not"], ["no", "A", "one"]] * 2, "label": [1, 2, 0, 1]},
    ),
    "prompted": (TaskSpec("films", labels=("bad", "good")), {"text": WORDS, "label": [1, 0, 1, 1]}),
}


def causal(kind: str) -> tuple[Program, dict[str, Split]]:
    """A causal language model with rows of each split: of completions, text choices or prompted classes."""
    spec, columns = CAUSAL[kind]
    rows = {
        name: Split(Dataset.from_dict(columns).select(chosen), spec, name)
        for name, chosen in (("train", [0, 1, 2, 3]), ("validation", [0, 1, 2]), ("test", [3, 0]))
    }
    lora, task = LoraConfig(r=2, target_modules=["q_proj"]), Task(spec, rows["train"])
    model = Gaussian(deviation=0.3)
    return Program.from_pretrained(str(causal_base()), task, lora=lora, model=model, observation=kind), rows


@pytest.mark.parametrize("backend", ["map", "svi", "laplace", "sgld"])
def test_a_diagnosis_of_completions(backend: str, tmp_path: Path) -> None:
    program, rows = causal("completions")
    settings = {name: min(value, 1) if name == "batch_size" else value for name, value in SETTINGS[backend].items()}
    posterior = fit(program, rows["train"], backend, progress=False, **settings)
    found = diagnose(posterior, rows["validation"], rows["train"], rows["test"], draws=30, progress=False)
    found.save(tmp_path, "of texts")
    text, figures = (tmp_path / "diagnosis.md").read_text(), json.loads((tmp_path / "diagnosis.json").read_text())
    random, dense = backend != "map", backend in ("svi", "laplace")
    assert ("khat" in figures) == dense and ("elpd_loo" in figures) == random
    assert ("rests at the end" in text or "still falls" in text or "rises" in text) == (backend == "svi")
    assert ("are effective for every text" in text) == (backend == "sgld")
    prediction = posterior.predict(rows["validation"], 30, progress=False)
    assert isinstance(prediction, SequencePrediction)
    expected = prediction.metrics(intervals=False)
    assert figures["perplexity"] == pytest.approx(expected["perplexity"].value, abs=1e-6)
    alone = -prediction.log_likelihood.mean()
    assert ("A draw alone has nll" in text) == random
    assert expected["nll"].value + figures.get("disagreement", 0) == pytest.approx(float(alone), abs=1e-6)
    tokens = token_calibration(posterior, rows["validation"], 30, progress=False)
    assert figures["token_accuracy"] == pytest.approx(tokens.accuracy) and f"Of {len(tokens.correct)} tokens" in text
    assert figures["token_ece_15"] == pytest.approx(tokens.ece()) and figures["auroc_nll"] is not None
    assert ("auroc_disagreement" in figures) == random
    assert figures["prior_nll_token"] > 0 and f"(all of {program.network.vocab_size} tokens alike" in text
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == set(found.pictures) and {"reliability", "risk", "shift", "prior_predictive"} <= pictures
    assert ("uncertainty" in pictures) == random
    assert read(tmp_path / "posterior.nc")["log_likelihood"]["y"].sizes["example"] == 4


@pytest.mark.parametrize("kind", ["text-choices", "prompted"])
def test_a_diagnosis_of_what_a_causal_language_model_chooses(kind: str, tmp_path: Path) -> None:
    program, rows = causal(kind)
    posterior = fit(program, rows["train"], "svi", progress=False, **SETTINGS["svi"])
    found = diagnose(posterior, rows["validation"], rows["train"], rows["test"], draws=30, progress=False)
    found.save(tmp_path, "of choices")
    text, figures = (tmp_path / "diagnosis.md").read_text(), json.loads((tmp_path / "diagnosis.json").read_text())
    assert program.observation.name == kind
    assert {"khat", "elpd_loo", "accuracy", "nll", "ece_15", "aurc", "auroc_entropy", "prior_confidence"} <= set(
        figures
    )
    prediction = posterior.predict(rows["validation"], 30, progress=False)
    assert figures["nll"] == pytest.approx(prediction.metrics()["nll"].value, abs=1e-6) and "3 rows of" in text


def priced(name: str, numbers: range) -> Split:
    """Rows with a real label each."""
    words = text_rows(numbers.stop).dataset["text"]
    columns = {"text": [words[number] for number in numbers], "price": [100.0 + 7 * (number % 5) for number in numbers]}
    return Split(Dataset.from_dict(columns), TaskSpec("prices", "regression", ("text",), "price"), name)


@pytest.mark.parametrize("backend", SETTINGS)
def test_a_diagnosis_of_real_labels(backend: str, tmp_path: Path) -> None:
    train, rows, other = priced("train", range(12)), priced("validation", range(9)), priced("test", range(12, 18))
    base = saved_base(tmp_path / "base")
    program = Program.from_pretrained(base, Task(train.spec, train), model=Gaussian(deviation=0.1), max_length=16)
    posterior = fit(program, train, backend, progress=False, **SETTINGS[backend])
    found = diagnose(posterior, rows, train, other, draws=30, progress=False)
    found.save(tmp_path / "out", "of a test")
    text = (tmp_path / "out" / "diagnosis.md").read_text()
    figures = json.loads((tmp_path / "out" / "diagnosis.json").read_text(), parse_constant=pytest.fail)
    random, dense = backend != "map", backend in ("svi", "laplace")
    assert ("khat" in figures) == dense and ("elpd_loo" in figures) == random
    assert ("R-hat of predicted means" in text) == ("effective for every mean" in text) == (backend == "sgld")
    own, shifted = (posterior.predict(each, 30, progress=False) for each in (rows, other))
    assert isinstance(own, ValuePrediction) and isinstance(shifted, ValuePrediction)
    measured = own.metrics()
    assert {name: figures[name] for name in measured} == pytest.approx(
        {name: measured[name].value for name in measured}
    )
    assert figures["deviation"] == pytest.approx(float(own.variance.sqrt().mean()))
    assert (
        figures["disagreement"] == pytest.approx(float(own.disagreement.mean()))
        and (figures["disagreement"] > 0) == random
    )
    assert figures["auroc_disagreement"] == pytest.approx(auroc(own.disagreement, shifted.disagreement))
    after = found.data["posterior_predictive"]["mean"].values.std(-1).mean()
    assert figures["posterior_deviation"] == pytest.approx(after) and figures["prior_deviation"] > 0
    assert f"labels differ by {np.std(train.labels().numpy()):.3g}" in text
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures == set(found.pictures) >= {"calibration", "values", "shift", "prior_predictive"}


@pytest.mark.parametrize(
    ("inside", "rows", "verdict"),
    # Of 30 labels 23 to 30 are inside with a chance of 95 %, of 200 they are 171 to 188.
    [(22, 30, "narrow"), (23, 30, "as wide"), (30, 30, "as wide"), (170, 200, "narrow"), (189, 200, "too wide")],
)
def test_intervals_are_judged_by_how_many_labels_they_hold(inside: int, rows: int, verdict: str) -> None:
    assert verdict in of_values._width(inside, rows)


def test_what_has_no_value_is_left_out_and_what_has_no_interval_has_none_told() -> None:
    found = {"rmse": Interval(4.125), "pearson": Interval(math.nan), "nll": Interval(1.5, 1.0, 2.0)}
    assert listed(found, ".3g") == "rmse 4.12, nll 1.5 (1 to 2)"


def test_predictions_of_which_nothing_is_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = lora_regression()
    posterior = fit(known.program, known.rows, "svi", progress=False, epochs=1)
    monkeypatch.delitem(report.KINDS, ValuePrediction)
    with pytest.raises(PosteriorError, match="what 'value' predicts there is to_inference_data"):
        diagnose(posterior, known.rows, progress=False)


@pytest.mark.parametrize(
    ("shape", "draws", "verdict"),
    [
        (-0.1, 10_000, "draws of the guide stand for draws of the posterior"),
        (0.23, 60, "is not known"),  # its error is 0.36
        (0.23, 10_000, "draws of the guide stand for draws of the posterior"),
        (0.48, 10_000, "once they are weighted"),
        (0.70, 10_000, "is not known"),
        (0.75, 10_000, "is not known"),
        (0.90, 10_000, "is far from the posterior"),
        (np.inf, 10_000, "is far from the posterior"),
    ],
)
def test_verdicts_on_khat_weigh_its_error(shape: float, draws: int, verdict: str) -> None:
    posterior: Any = SimpleNamespace(
        record=SimpleNamespace(point_sites=()), program=SimpleNamespace(sites=(), model=Gaussian())
    )
    assert verdict in report._of_khat(shape, draws, posterior, "sample")


def test_an_infinite_khat_is_seen() -> None:
    (bars,) = plots.khat_bars(np.inf, {"a layer": 2.0, "another": np.inf}).axes
    assert [text.get_text().strip() for text in bars.texts] == ["infinite"] * 2
    # Beyond the longest of the others, by a tenth.
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([2.2, 2.0, 2.2])
    (rows,) = plots.pareto_k(np.array([3, 5, 8]), np.array([np.inf, 0.2, np.inf]), 0.5).axes
    assert rows.get_xlabel() == "training row (2 of 3 above 0.50, 2 infinite)"
    assert np.isfinite(rows.lines[1].get_ydata()).all() and rows.lines[1].get_xdata().tolist() == [3, 8]


def test_choices_that_a_row_lacks_count_in_no_share_of_rhat(monkeypatch: pytest.MonkeyPatch) -> None:
    of_rows = np.array([[1.2, 1.0, np.nan], [np.inf, 1.0, np.nan]])  # infinite: chains that stand still, apart
    monkeypatch.setattr(report, "prediction_rhat", lambda _: SimpleNamespace(values=of_rows))
    monkeypatch.setattr(report, "shuffled", lambda _: SimpleNamespace(values=np.array([[1.0, 1.1, np.nan]])))
    found = report.Diagnosis(data=SimpleNamespace(attrs={"draws_are": "independent"}))
    report._agreement(found, cast(Posterior, None), "choices", "choice")
    ((sentence,),) = found.verdicts.values()
    assert "at most 100 or more, above 1.01 in 50% of them" in sentence and "at most 1.10 and in 50%" in sentence
    of_rows[:] = np.nan
    none = report.Diagnosis(data=found.data)
    report._agreement(none, cast(Posterior, None), "choices", "choice")
    assert none.verdicts == {report.NEAR: ["R-hat is left out: the draws of choices do not differ."]}
