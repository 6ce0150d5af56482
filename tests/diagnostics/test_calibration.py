from __future__ import annotations

import pytest
import torch

from bayeslora.diagnostics import auroc, by_class, risk_coverage
from bayeslora.errors import DataError
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.values import ValuePrediction


def prediction(probabilities: list[list[float]], labels: list[int]) -> ClassPrediction:
    logits = torch.tensor(probabilities).log().unsqueeze(0)
    return ClassPrediction(logits, torch.tensor(labels), label_names=("a", "b"))


def test_risk_is_over_the_surest_rows() -> None:
    found = risk_coverage(prediction([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], [1, 0, 1, 0]))
    # By confidence: 0.9 right, 0.8 right, 0.7 wrong, 0.6 wrong.
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.risk.tolist() == pytest.approx([0.0, 0.0, 1 / 3, 0.5])
    assert found.area == pytest.approx((1 / 3 + 0.5) / 4)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]])
def test_rows_of_equal_confidence_come_in_no_order(labels: list[int]) -> None:
    found = risk_coverage(prediction([[0.7, 0.3]] * 4 + [[0.9, 0.1]], labels))
    # The surest row is right; of the other four half are wrong.
    assert found.risk.tolist() == pytest.approx([0, 0.5 / 2, 1 / 3, 1.5 / 4, 2 / 5])


def test_each_class_has_its_own_calibration() -> None:
    found = by_class(prediction([[0.75, 0.25]] * 4, [0, 0, 0, 1]), bins=4)
    assert [each.name for each in found] == ["a", "b"]
    assert [each.ece for each in found] == pytest.approx([0.0, 0.0], abs=1e-6)
    off = by_class(prediction([[0.9, 0.1]] * 4, [0, 0, 1, 1]), bins=4)
    assert [each.ece for each in off] == pytest.approx([0.4, 0.4])
    assert off[0].rows.tolist() == [4] and off[0].share.tolist() == [0.5]


def test_auroc_counts_pairs_and_half_of_ties() -> None:
    known, other = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.25, 0.3])
    # 0.25 is above two of three; 0.3 above two, and level with the third.
    assert auroc(known, other) == pytest.approx((2 + 2.5) / 6)
    assert auroc(known, known) == 0.5


def test_labels_are_needed() -> None:
    with pytest.raises(DataError, match="needs predicted classes and their labels"):
        risk_coverage(ValuePrediction(torch.zeros(1, 3, 1), torch.zeros(3)))
    with pytest.raises(DataError, match="needs predicted classes and their labels"):
        by_class(ClassPrediction(torch.zeros(1, 3, 2), None))
