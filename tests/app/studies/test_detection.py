from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bayeslora.predict.selective import auroc, risk_by_coverage


def test_the_area_is_that_of_the_curve() -> None:
    generator = np.random.default_rng(0)
    low, high = generator.integers(5, size=40), generator.integers(2, 8, size=25)  # with ties
    expected = roc_auc_score([0] * 40 + [1] * 25, np.concatenate([low, high]))
    assert auroc(low, high) == pytest.approx(expected)
    assert math.isnan(auroc([], [1.0]))


def test_risk_falls_as_the_unsure_are_left_out() -> None:
    coverage, risk = risk_by_coverage([0.9, 0.6, 0.8, 0.7], [1, 0, 1, 0])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])


def test_the_order_of_rows_that_are_equally_sure_does_not_matter() -> None:
    _, one = risk_by_coverage([0.9, 0.9, 0.5], [0, 1, 1])
    _, other = risk_by_coverage([0.9, 0.9, 0.5], [1, 0, 1])
    assert one.tolist() == other.tolist() == pytest.approx([0.5, 0.5, 1 / 3])
