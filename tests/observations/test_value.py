"""Real labels in their own unit, whatever that is."""

from __future__ import annotations

from math import log, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from scenarios import saved_base, text_rows
from transformers import BertForSequenceClassification

from bayeslora.errors import DataError, SettingError
from bayeslora.inference import fit, load
from bayeslora.observations import Value, build
from bayeslora.program import Program
from bayeslora.tasks import Split, Task, TaskSpec

PRICES = TaskSpec("prices", "regression")
VALUE = Value(0.5, 3.0, 2.0)


def priced(n: int = 12, mean: float = 3000.0, unit: float = 2.0) -> Split:
    """Labels that alternate between two values, by so many deviations on both sides of their mean."""
    labels = [mean + unit * (-1) ** row for row in range(n)]
    return Split(Dataset.from_dict({"text": text_rows(n).dataset["text"], "label": labels}), PRICES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base"))


def program(base: Path, rows: Split | None = None, **settings: Any) -> Program:
    return Program.from_pretrained(base, Task(PRICES, rows or priced()), model="gaussian", max_length=16, **settings)


def test_labels_have_their_mean_and_unit_in_density_and_prediction() -> None:
    outputs, labels = torch.randn(3, 5, 1).double(), torch.randn(5).double()
    expected = 3 + 2 * outputs[..., 0]
    density = -((labels - expected) ** 2) / (2 * 0.25) - log(0.5) - log(2 * pi) / 2
    torch.testing.assert_close(VALUE.log_prob(outputs, labels), density)
    found = VALUE.predicted(outputs, labels)
    torch.testing.assert_close(found.log_predictive_density, density.logsumexp(0) - log(3))
    torch.testing.assert_close(found.mean, expected.mean(0))
    torch.testing.assert_close(found.variance, 0.25 + expected.var(0, correction=0))


def test_a_program_has_the_mean_and_spread_of_its_training_rows(base: Path) -> None:
    assert program(base).observation == Value(1.0, 3000.0, 2.0)
    told = {"scale": "0.1", "mean": 7}
    assert program(base, observation_settings=told).observation == Value(0.1, 7.0, 2.0)
    assert program(base, priced(4, 5.0, 0.0)).observation == Value(0.5, 5.0, 1.0)  # labels that are all the same
    with pytest.raises(SettingError, match="unit should be greater than 0"):
        program(base, observation_settings={"unit": 0})
    with pytest.raises(SettingError, match="mean should be a finite number"):
        program(base, observation_settings={"mean": "nan"})
    with pytest.raises(DataError, match="beyond single precision"):
        program(base, priced(4, 0.0, 1e200))
    unlabelled = priced()
    unlabelled = Split(unlabelled.dataset.remove_columns("label"), PRICES)
    assert program(base, unlabelled).observation == Value()


@pytest.mark.parametrize("backend", ["svi", "laplace"])
def test_a_fit_is_as_good_in_any_unit(base: Path, tmp_path: Path, backend: str) -> None:
    errors, densities = [], []
    for mean, unit in ((0.0, 1.0), (-3000.0, 8.0)):
        rows = priced(12, mean, unit)
        fitted = fit(program(base, rows), rows, backend, epochs=2, progress=False)
        metrics = fitted.predict(rows, progress=False).metrics(intervals=False)
        errors.append(metrics["rmse"].value / unit)
        densities.append(metrics["nll"].value - log(unit))
    # The same fit, but for labels in single precision, of which those near 3000 have three digits behind the point:
    # that may also move the width of a prior. A density in another unit would be off by log 8.
    assert errors[0] == pytest.approx(errors[1], rel=1e-3) and errors[0] < 2
    assert densities[0] == pytest.approx(densities[1], abs=1e-2)
    fitted.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.program.observation == fitted.program.observation == Value(4.0, -3000.0, 8.0)
    assert again.predict(rows, progress=False).mean.equal(fitted.predict(rows, progress=False).mean)


def test_what_was_saved_without_mean_and_unit_has_neither() -> None:
    assert build({"name": "value", "scale": 0.3}) == Value(0.3, 0.0, 1.0)


def test_a_head_that_was_trained_keeps_its_unit(base: Path, tmp_path: Path) -> None:
    first = program(base)
    fit(first, priced(), "mle", epochs=1, progress=False).save(tmp_path / "run")
    others = priced(8, 10.0, 4.0)
    assert program(base, others, adapter=tmp_path / "run").observation == Value(2.0, 3000.0, 2.0)
    first.network.save_pretrained(tmp_path / "adapter")
    assert program(base, others, adapter=tmp_path / "adapter").observation == Value(2.0)
    headed = BertForSequenceClassification.from_pretrained(base, num_labels=1, ignore_mismatched_sizes=True)
    headed.save_pretrained(tmp_path / "headed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "headed" / name).write_bytes((base / name).read_bytes())
    assert program(tmp_path / "headed", others).observation == Value(2.0)


def test_the_base_rate_of_values_is_said_of_their_mean(base: Path) -> None:
    # Labels are two from their mean, under noise of one: -2 - log(2 pi) / 2.
    with pytest.warns(UserWarning, match=r"by the mean of the labels alone it is -2\.919"):
        fit(program(base), priced(), "mle", epochs=1, learning_rate=1e-9, progress=False)
