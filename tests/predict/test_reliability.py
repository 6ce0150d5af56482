"""What reliability diagrams show: guesses by how sure they are, and how far chance reaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scenarios import class_prediction
from scipy.stats import binomtest

from bayeslora.diagnostics import TokenCalibration
from bayeslora.predict import metrics
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.reliability import Guesses, bin_guesses, guesses_of


def test_bins_hold_the_rows_of_their_confidence() -> None:
    found, truth = class_prediction()
    assert found.labels is not None
    binned = bin_guesses(guesses_of(found, truth), 10)
    confidence, predicted = (each.numpy() for each in found.probabilities.max(-1))
    correct = predicted == found.labels.numpy()
    inside = (confidence > 0.6) & (confidence <= 0.7)
    place = int(np.flatnonzero(np.isclose(binned.centre, 0.65))[0])
    assert binned.rows.sum() == 300 and binned.rows[place] == inside.sum()
    assert binned.confidence[place] == pytest.approx(confidence[inside].mean())
    assert binned.accuracy[place] == pytest.approx(correct[inside].mean())
    assert binned.truth is not None
    expected = truth.numpy()[np.arange(300), predicted][inside].mean()
    assert binned.truth[place] == pytest.approx(expected)
    assert binned.ece == pytest.approx(metrics.ece(found.probabilities, found.labels, 10))


@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [0] * 5, [1] * 5])
def test_intervals_are_those_of_wilson(labels: list[int]) -> None:
    certain = ClassPrediction(torch.tensor([[[100.0, -100.0]] * len(labels)]), torch.tensor(labels))
    binned = bin_guesses(guesses_of(certain))
    expected = binomtest(labels.count(0), len(labels)).proportion_ci(confidence_level=0.95, method="wilson")
    assert (binned.low[0], binned.high[0]) == pytest.approx((expected.low, expected.high))


def test_a_confidence_of_one_has_a_bin() -> None:
    certain = ClassPrediction(torch.tensor([[[100.0, -100.0]] * 4]), torch.tensor([0, 0, 0, 1]))
    binned = bin_guesses(guesses_of(certain))
    assert binned.rows.tolist() == [4] and binned.accuracy.tolist() == [0.75]


def test_tokens_of_a_text_are_no_independent_guesses() -> None:
    random = np.random.default_rng(0)
    right, sure = random.integers(0, 2, 40).astype(float), np.full(40, 0.5)
    alone = bin_guesses(Guesses(sure, right))
    # Of ten tokens that are all the same a text says no more than by one: about as many independent ones as texts.
    many = bin_guesses(TokenCalibration(sure.repeat(10), right.repeat(10), np.arange(40).repeat(10)))
    assert many.rows == [400] and many.accuracy == pytest.approx(alone.accuracy)
    assert many.high - many.low == pytest.approx(alone.high - alone.low, rel=0.02)  # 39 of 40 in the variance
    assert many.high - many.low > 1.01 * (alone.high - alone.low)
    # Tokens that do not depend on each other count each; the tolerance is that of a variance by 400 texts.
    free = random.integers(0, 2, 4000).astype(float)
    texts = bin_guesses(TokenCalibration(np.full(4000, 0.5), free, np.arange(4000) // 10))
    each = bin_guesses(Guesses(np.full(4000, 0.5), free))
    assert texts.high - texts.low == pytest.approx(each.high - each.low, rel=3 * (0.5 / 400) ** 0.5)
    # Where all are right, there is no variance to tell; one text is one guess.
    sure_of = bin_guesses(TokenCalibration(np.ones(30), np.ones(30), np.zeros(30, int)))
    assert sure_of.low[0] == pytest.approx(binomtest(1, 1).proportion_ci(method="wilson").low)
    assert sure_of.high[0] == 1 and (sure_of.accuracy - sure_of.low >= 0).all()
