from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bayeslora.errors import DataError
from bayeslora.predict import metrics
from bayeslora.predict.prediction import ClassPrediction, Prediction
from bayeslora.predict.reliability import guesses_of
from bayeslora.predict.truth import with_truth
from bayeslora.predict.values import ValuePrediction
from bayeslora.tasks import Split, TaskSpec, rows_of

SPEC = TaskSpec("counting", labels=("none", "one", "more"))
TRUTH = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]


@pytest.fixture
def rows() -> Split:
    columns = {"text": ["a", "b"], "label": [0, 2], "probabilities": TRUTH}
    return rows_of(SPEC, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def prediction(names: tuple[str, ...]) -> ClassPrediction:
    order = [SPEC.labels.index(name) for name in names]
    logits = torch.tensor(TRUTH).log()[:, order].unsqueeze(0)
    return ClassPrediction(logits, torch.tensor([order.index(0), order.index(2)]), label_names=names)


@pytest.mark.parametrize("names", [SPEC.labels, ("more", "none", "one")])
def test_a_prediction_that_is_the_truth_has_no_distance_from_it_whatever_the_order_of_classes(
    rows: Split, names: tuple[str, ...]
) -> None:
    found = with_truth(prediction(names), rows).metrics()
    # Single precision of the logits.
    assert found["kl"].value == pytest.approx(0, abs=1e-6) and found["nll"].value == pytest.approx(
        -(np.log(0.7) + np.log(0.8)) / 2, rel=1e-6
    )


def test_an_answer_that_is_no_class_is_never_true(rows: Split) -> None:
    known = prediction(SPEC.labels)
    outputs = torch.nn.functional.pad(known.outputs, (0, 1), value=-torch.inf)
    more = ClassPrediction(outputs, known.labels, label_names=(*SPEC.labels, "(other)"))
    found = with_truth(more, rows)
    assert found.truth.tolist() == [[*row, 0.0] for row in TRUTH]
    assert found.metrics()["kl"].value == pytest.approx(with_truth(known, rows).metrics()["kl"].value)


def test_rows_that_do_not_say_the_truth_have_no_distance_from_it(rows: Split) -> None:
    plain = Split(rows.dataset.remove_columns("probabilities"), SPEC)
    found = with_truth(prediction(SPEC.labels), plain)
    assert found.truth is None and "kl" not in found.metrics()
    values = ValuePrediction(torch.zeros(1, 2, 1), torch.tensor([0.0, 1.0]))
    assert with_truth(values, rows) is values


@pytest.mark.parametrize(
    "said", [["0.1", "0.9"], [0.1, 0.9], [[0.1, 0.9], [0.1, 0.9]], [[0.1, 0.9], [0.1]], [None, None]]
)
def test_a_column_of_something_else_is_no_truth(said: list[object], rows: Split) -> None:
    columns = {"text": ["a", "b"], "label": [0, 2], "probabilities": said}
    other = rows_of(SPEC, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    with pytest.raises(DataError, match=r"'probabilities' .* begins with .*, expected lists .* of 3 classes"):
        with_truth(prediction(SPEC.labels), other)


def test_the_metrics_are_those_of_both_parts(rows: Split) -> None:
    plain = prediction(SPEC.labels)
    parts = {**plain.metrics(seed=3), **metrics.against_truth(plain.log_probabilities, TRUTH, seed=3)}
    assert dict(with_truth(plain, rows).metrics(seed=3)) == parts


def test_the_truth_is_saved_with_a_prediction_and_marked_in_its_diagram(rows: Split, tmp_path: Path) -> None:
    found = with_truth(prediction(SPEC.labels), rows)
    found.save(tmp_path / "found.safetensors")
    loaded = Prediction.load(tmp_path / "found.safetensors")
    assert loaded.truth.tolist() == TRUTH
    assert guesses_of(loaded).truth.tolist() == [0.7, 0.8]
