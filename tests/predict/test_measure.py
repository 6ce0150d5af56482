from __future__ import annotations

import numpy as np
import pytest
import torch

from bayeslora.predict import metrics
from bayeslora.predict.measure import measure, true_probabilities
from bayeslora.predict.prediction import ClassPrediction, ValuePrediction
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
    found = measure(prediction(names), rows)
    # Single precision of the logits.
    assert found["kl"].value == pytest.approx(0, abs=1e-6) and found["nll"].value == pytest.approx(
        -(np.log(0.7) + np.log(0.8)) / 2, rel=1e-6
    )


def test_an_answer_that_is_no_class_is_never_true(rows: Split) -> None:
    known = prediction(SPEC.labels)
    outputs = torch.nn.functional.pad(known.outputs, (0, 1), value=-torch.inf)
    more = ClassPrediction(outputs, known.labels, label_names=(*SPEC.labels, "(other)"))
    assert true_probabilities(rows, more).tolist() == [[*row, 0.0] for row in TRUTH]
    assert measure(more, rows)["kl"].value == pytest.approx(measure(known, rows)["kl"].value)


def test_rows_that_do_not_say_the_truth_have_no_distance_from_it(rows: Split) -> None:
    plain = Split(rows.dataset.remove_columns("probabilities"), SPEC)
    assert true_probabilities(plain, prediction(SPEC.labels)) is None
    assert "kl" not in measure(prediction(SPEC.labels), plain)
    assert "kl" not in measure(ValuePrediction(torch.zeros(1, 2, 1), torch.tensor([0.0, 1.0])), rows)


def test_intervals_are_made_once_and_those_of_the_parts(rows: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    found, made, bootstrap = prediction(SPEC.labels), [], metrics.bootstrap
    parts = {**found.metrics(seed=3), **metrics.against_truth(found.log_probabilities, TRUTH, seed=3)}
    monkeypatch.setattr("bayeslora.predict.measure.bootstrap", lambda *rest: made.append(rest) or bootstrap(*rest))
    assert dict(measure(found, rows, seed=3)) == parts
    assert len(made) == 1
