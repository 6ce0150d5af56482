from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, matthews_corrcoef

from bayeslora.errors import DataError
from bayeslora.predict import metrics, resampling
from bayeslora.predict.metrics import Interval, Metrics

Array = NDArray[Any]


def rows(n: int = 203, classes: int = 3, seed: int = 0, scale: float = 2.0) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    logits = scale * generator.normal(size=(n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities, generator.integers(classes, size=n)


def binned(confidence: Array, correct: Array, edges: list[tuple[float, float]]) -> float:
    """ECE in the words of its definition: bins (low, high], weighted by their share of rows."""
    total = 0.0
    for low, high in edges:
        inside = [(c, k) for c, k in zip(confidence, correct, strict=True) if low < c <= high]
        if inside:
            gap = np.mean([k for _, k in inside]) - np.mean([c for c, _ in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_metrics_equal_those_of_scikit_learn(classes: int) -> None:
    probabilities, labels = rows(classes=classes)
    predicted, known = probabilities.argmax(1), list(range(classes))
    expected = log_loss(labels, probabilities, labels=known)
    assert metrics.accuracy(probabilities, labels) == pytest.approx(accuracy_score(labels, predicted))
    assert metrics.nll(probabilities, labels) == pytest.approx(expected)
    assert metrics.mcc(probabilities, labels) == pytest.approx(matthews_corrcoef(labels, predicted))
    expected = brier_score_loss(labels, probabilities, labels=known, scale_by_half=False)
    assert metrics.brier(probabilities, labels) == pytest.approx(expected)


@pytest.mark.parametrize("bins", [1, 10, 15, 20])
def test_ece_equals_its_definition(bins: int) -> None:
    probabilities, labels = rows()
    edges = [(i / bins, (i + 1) / bins) for i in range(bins)]
    expected = binned(probabilities.max(1), probabilities.argmax(1) == labels, edges)
    assert metrics.ece(probabilities, labels, bins) == pytest.approx(expected)


def test_ece_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
    labels = np.array([0, 1, 1, 1])
    # All four lie in the upper half: |3 - 2.95| / 4; each has a tenth of its own.
    assert metrics.ece(probabilities, labels, bins=2) == pytest.approx(0.05 / 4)
    assert metrics.ece(probabilities, labels, bins=10) == pytest.approx((0.1 + 0.8 + 0.3 + 0.45) / 4)


def test_a_confidence_of_one_lies_in_the_last_bin_and_an_edge_in_the_lower_one() -> None:
    confidence = np.array([0.0, 0.1, 0.1000001, 0.5, 1.0])
    assert resampling.bin_of(confidence, 10).tolist() == [0, 0, 1, 4, 9]
    certain = np.eye(2)[[0, 1, 0, 1]]
    assert metrics.ece(certain, [0, 1, 1, 1]) == pytest.approx(0.25)
    assert metrics.ece(certain, [0, 1, 0, 1]) == 0


def test_adaptive_ece_has_equally_many_rows_in_each_bin() -> None:
    probabilities, _ = rows(n=150)
    # Labels that follow the probabilities: bins then err to either side, and are not the one error of all rows.
    labels = np.array([np.random.default_rng(row).choice(3, p=each) for row, each in enumerate(probabilities)])
    confidence, correct = probabilities.max(1), (probabilities.argmax(1) == labels).astype(float)
    order = np.argsort(confidence)
    gaps = (correct - confidence)[order].reshape(15, 10).sum(1)
    assert np.abs(gaps).sum() > 1.2 * np.abs(gaps.sum())
    assert metrics.ece_adaptive(probabilities, labels) == pytest.approx(np.abs(gaps).sum() / 150)


def test_adaptive_ece_keeps_ties_together() -> None:
    probabilities = np.repeat([[0.75, 0.25]], 40, axis=0)
    labels = np.repeat([0, 1], [30, 10])
    assert metrics.ece_adaptive(probabilities, labels) == pytest.approx(0, abs=1e-15)
    assert metrics.ece_adaptive(probabilities, labels[::-1]) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("n", "sureness"), [(277, 0.5), (408, 2.0), (872, 4.0)])
def test_ece_by_chance_is_the_mean_of_labels_drawn_from_the_probabilities(n: int, sureness: float) -> None:
    generator = np.random.default_rng(0)
    logits = sureness * generator.normal(size=(n, 2))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    drawn = (generator.random((2000, n)) > probabilities[:, 0]).astype(int)
    simulated = np.array([metrics.ece(probabilities, labels) for labels in drawn])
    found = metrics.ece_by_chance(probabilities)
    # Three standard errors of 2,000 draws, and 3 % for gaps of few rows, which are not quite normal.
    assert found == pytest.approx(simulated.mean(), abs=3 * simulated.std() / 2000**0.5 + 0.03 * simulated.mean())
    assert metrics.classification(np.log(probabilities), drawn[0])["ece_15_by_chance"].value == found


def test_ece_by_chance_of_what_is_certain_or_nearly_so() -> None:
    assert metrics.ece_by_chance(np.eye(2)[[0, 1, 0, 1]]) == 0
    # One row that is wrong with probability 0.02: 0.98 x 0.02 + 0.02 x 0.98.
    assert metrics.ece_by_chance([[0.98, 0.02]]) == pytest.approx(2 * 0.98 * 0.02)
    # All of 100 rows in one bin, each a coin: the mean distance of a binomial from its half.
    coins = stats.binom(100, 0.5)
    exact = sum(coins.pmf(k) * abs(k - 50) for k in range(101)) / 100
    assert metrics.ece_by_chance(np.full((100, 2), 0.5)) == pytest.approx(exact, rel=0.01)


def test_values_do_not_depend_on_the_order_of_rows() -> None:
    probabilities, labels = rows()
    probabilities = np.round(probabilities, 1)  # many ties
    probabilities /= probabilities.sum(1, keepdims=True)
    order = np.random.default_rng(1).permutation(len(labels))
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities)
    first = metrics.classification(logs, labels, intervals=False)
    second = metrics.classification(logs[order], labels[order], intervals=False)
    assert {name: found.value for name, found in first.items()} == pytest.approx(
        {name: found.value for name, found in second.items()}
    )


def test_an_impossible_label_makes_the_nll_infinite_and_a_rare_one_does_not() -> None:
    probabilities, labels = rows(n=50)
    logs = np.log(probabilities)
    logs[0] = [0, -np.inf, -np.inf]
    labels[0] = 1
    found = metrics.classification(logs, labels)["nll"]
    assert (found.value, found.high) == (math.inf, math.inf)
    assert metrics.nll(np.exp(logs), labels) == math.inf
    logs[0, 1] = -900  # its probability is zero in double precision, its logarithm is not
    expected = -np.mean(logs[np.arange(50), labels])
    assert metrics.classification(logs, labels)["nll"].value == pytest.approx(expected)


def test_one_row() -> None:
    found = metrics.classification(np.log([[0.25, 0.75]]), [1])
    assert found["accuracy"].value == 1 and found["nll"].value == pytest.approx(-math.log(0.75))
    assert math.isnan(found["accuracy"].low) and math.isnan(found["nll"].high)  # it tells nothing of other rows
    assert found["ece_15"].value == pytest.approx(0.25)
    assert found["mcc"].value == 0


def test_a_single_class_has_no_correlation() -> None:
    assert metrics.mcc([[0.9, 0.1], [0.8, 0.2]], [0, 0]) == 0
    only = metrics.classification(np.zeros((4, 1)), [0, 0, 0, 0])
    assert only["accuracy"].value == 1
    assert only["nll"].value == only["brier"].value == only["ece_15"].value == only["mcc"].value == 0


def test_intervals_are_those_of_scipy_on_the_rows_themselves() -> None:
    probabilities, labels = rows(n=120)
    scores = -np.log(probabilities[np.arange(120), labels])
    guess, real = np.random.default_rng(1).normal(size=(2, 120))
    settings: dict[str, Any] = {"n_resamples": 1000, "method": "basic", "vectorized": True}
    expected = stats.bootstrap((scores,), np.mean, rng=np.random.default_rng(5), **settings).confidence_interval
    found = metrics.classification(np.log(probabilities), labels, seed=5)["nll"]
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    expected = stats.bootstrap(
        (np.arange(120),),
        lambda at, axis: stats.pearsonr(guess[at], real[at], axis=axis).statistic,
        rng=np.random.default_rng(5),
        **settings,
    ).confidence_interval
    found = metrics.regression(guess, np.zeros(120), real, seed=5)["pearson"]
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_resampled_statistics_equal_those_of_the_rows_written_out() -> None:
    """A row that counts twice is a row that stands there twice."""
    probabilities, labels = rows(n=60)
    probabilities = np.round(probabilities, 2)
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    correct = (predicted == labels).astype(float)
    generator = np.random.default_rng(3)
    drawn = generator.integers(60, size=(5, 60))
    counts = np.stack([np.bincount(each, minlength=60) for each in drawn]).astype(float)
    real, guess = np.round(generator.normal(size=(2, 60)), 1)
    for statistic, plain in [
        (resampling.calibration(confidence, correct, 15), metrics.ece),
        (resampling.calibration_adaptive(confidence, correct, 15), metrics.ece_adaptive),
        (resampling.matthews(predicted, labels, 3), metrics.mcc),
    ]:
        expected = [plain(probabilities[each], labels[each]) for each in drawn]
        assert statistic(counts) == pytest.approx(expected)
    expected = [stats.spearmanr(guess[each], real[each]).statistic for each in drawn]
    assert resampling.rank_correlation(guess, real)(counts) == pytest.approx(expected)
    expected = [stats.pearsonr(guess[each], real[each]).statistic for each in drawn]
    assert resampling.correlation(guess, real)(counts) == pytest.approx(expected)


def test_parts_of_rows_count_as_often_as_their_row() -> None:
    generator = np.random.default_rng(4)
    row = np.repeat(np.arange(12), generator.integers(1, 9, 12))
    confidence, correct = generator.random(len(row)), generator.integers(0, 2, len(row)).astype(float)
    drawn = generator.integers(12, size=(5, 12))
    counts = np.stack([np.bincount(each, minlength=12) for each in drawn]).astype(float)
    parts = [np.concatenate([np.flatnonzero(row == number) for number in each]) for each in drawn]
    expected = [resampling.once(resampling.calibration(confidence[at], correct[at], 10), len(at)) for at in parts]
    assert resampling.calibration(confidence, correct, 10, row)(counts) == pytest.approx(expected)
    ratio = resampling.ratio(np.bincount(row, correct), np.bincount(row).astype(float))
    assert ratio(counts) == pytest.approx([correct[at].mean() for at in parts])


def test_intervals_hold_the_value_follow_the_seed_and_not_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, labels = rows(n=400, classes=2)
    logs = np.log(probabilities)
    found = metrics.classification(logs, labels, seed=3)
    assert all(interval.low <= interval.value <= interval.high for interval in found.values())
    assert found != metrics.classification(logs, labels, seed=4)
    monkeypatch.setattr(resampling, "CHUNK", 400 * 7)
    again = metrics.classification(logs, labels, seed=3)
    for name, interval in found.items():
        assert (again[name].low, again[name].high) == pytest.approx((interval.low, interval.high))


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Labels are drawn from p = 0.5 + 0.5 (confidence - 0.5), so accuracy and calibration are known."""
    covered = {"accuracy": 0, "ece_10": 0}
    for seed in range(60):
        generator = np.random.default_rng(seed)
        confidence = generator.uniform(0.5, 1, size=500)
        correct = generator.random(500) < 0.5 + 0.5 * (confidence - 0.5)
        probabilities = np.stack([confidence, 1 - confidence], axis=1)
        found = metrics.classification(np.log(probabilities), np.where(correct, 0, 1), seed=seed)
        covered["accuracy"] += found["accuracy"].low <= 0.625 <= found["accuracy"].high
        covered["ece_10"] += found["ece_10"].low <= 0.125 <= found["ece_10"].high
    # Binomial(60, 0.95) is below 49 with probability 1e-4.
    assert covered["accuracy"] >= 49
    assert covered["ece_10"] >= 49


@pytest.mark.parametrize("n", [6, 200])
@pytest.mark.parametrize("right", [True, False])
def test_rows_that_are_all_right_or_all_wrong_do_not_make_an_accuracy_certain(n: int, right: bool) -> None:
    logs = np.log(np.tile([0.9, 0.1], (n, 1)))
    found = metrics.classification(logs, np.full(n, 0 if right else 1))["accuracy"]
    others = metrics.classification(np.where(logs > np.log(0.5), 0.0, -np.inf), np.zeros(n, int))
    assert all(others[name].high == 0 for name in ("nll", "brier", "ece_15"))  # which are no shares
    exact = stats.binomtest(n if right else 0, n).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_the_calibration_error_of_a_calibrated_model_is_not_told_to_be_large() -> None:
    """The error in truth is zero; that of 500 rows, and of resamples still more, is not."""
    covered = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        confidence = generator.uniform(0.5, 1, size=500)
        correct = generator.random(500) < confidence
        probabilities = np.stack([confidence, 1 - confidence], axis=1)
        covered += metrics.classification(np.log(probabilities), np.where(correct, 0, 1))["ece_10"].low == 0
    # Three of four, by 150 other simulations; percentiles of the resamples hold zero in none.
    assert covered >= 20


def test_regression_metrics() -> None:
    generator = np.random.default_rng(0)
    real = np.round(generator.normal(size=80), 1)
    guess = np.round(real + generator.normal(size=80), 1)
    densities = stats.norm(guess, 2.0).logpdf(real)
    found = metrics.regression(guess, densities, real)
    assert found["rmse"].value == pytest.approx(np.sqrt(np.mean((guess - real) ** 2)))
    assert found["rmse"].value == metrics.rmse(guess, real)
    assert found["nll"].value == pytest.approx(-densities.mean())
    assert found["pearson"].value == pytest.approx(stats.pearsonr(guess, real).statistic)
    assert found["spearman"].value == pytest.approx(stats.spearmanr(guess, real).statistic)
    assert all(interval.low < interval.value < interval.high for interval in found.values())
    below = stats.norm(guess, 2.0).cdf(real)
    with_coverage = metrics.regression(guess, densities, real, below=below)
    assert with_coverage.pop("coverage_90").value == np.mean(np.abs(real - guess) <= 2 * stats.norm.ppf(0.95))
    assert with_coverage == found
    with pytest.raises(DataError, match="Expected 80 probabilities, one for each label, found the shape"):
        metrics.regression(guess, densities, real, below=below[:-1])
    for wrong in (math.nan, -0.1, 1.1):
        with pytest.raises(DataError, match="Row 2 has .* expected the probability of what is below its label"):
            metrics.regression(guess, densities, real, below=np.where(np.arange(80) == 2, wrong, below))


def test_a_correlation_with_a_constant_is_undefined() -> None:
    assert math.isnan(metrics.pearson([0.1] * 7, np.arange(7)))
    assert math.isnan(metrics.spearman([0.1] * 7, np.arange(7)))
    assert math.isnan(metrics.regression([1.0], [0.0], [2.0])["pearson"].low)


def test_distance_from_the_truth() -> None:
    truth = np.array([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0]])
    same = metrics.against_truth(np.log(np.maximum(truth, 1e-300)), truth)
    assert same["kl"].value == pytest.approx(0) and same["ece_true"].value == pytest.approx(0)
    other = np.array([[0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
    found = metrics.against_truth(np.log(other), truth)
    expected = np.mean([stats.entropy(p, q) for p, q in zip(truth, other, strict=True)])
    assert found["kl"].value == pytest.approx(expected)
    # Confidences 0.8, 0.6, 0.7 lie in three bins of 15; the truth gives 0.9, 0.5, 1 to the same classes.
    assert found["ece_true"].value == pytest.approx((0.1 + 0.1 + 0.3) / 3)
    with np.errstate(divide="ignore"):
        assert metrics.against_truth(np.log([[0.0, 1.0]]), [[0.5, 0.5]])["kl"].value == math.inf
    with pytest.raises(DataError, match=r"shape \(1, 2\), true probabilities \(2, 2\)"):
        metrics.against_truth(np.log([[0.5, 0.5]]), [[0.5, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.zeros((0, 2)), [], r"found shape \(0, 2\)"),
        ([[0.5, 0.5]], [0, 1], "Expected 1 labels"),
        ([[0.5, 0.5]], [2], "Label 2 of row 0 is no class number from 0 to 1"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, -1], "Label -1 of row 1"),
        ([[0.5, 0.5], [2.0, -1.0]], [0, 1], "Row 1 is no probability distribution"),
        ([[0.5, 0.5], [math.nan, 0.5]], [0, 1], "Row 1 is no probability distribution"),
        ([0.5, 0.5], [0, 1], "Expected probabilities"),
    ],
)
def test_what_is_no_prediction_is_refused(probabilities: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.nll(probabilities, labels)
    with pytest.raises(DataError, match="Expected as many predictions as labels"):
        metrics.rmse([1.0, 2.0], [1.0])


def test_probabilities_in_place_of_their_logarithms_are_called_so_and_the_other_way_round() -> None:
    probabilities, labels = np.array([[0.9, 0.1], [0.25, 0.75]]), [0, 1]
    logs = np.log(probabilities)
    for each in (metrics.nll, metrics.brier, metrics.ece, metrics.accuracy):
        with pytest.raises(
            DataError, match="expected probabilities. These look like log-probabilities: give np.exp of"
        ):
            each(logs, labels)
    for of_logs in (
        lambda: metrics.classification(probabilities, labels),
        lambda: metrics.against_truth(probabilities, probabilities),
    ):
        with pytest.raises(
            DataError, match=r"exp of \[0.9 0.1\] sums to 3.56.* These look like probabilities: give np.log"
        ):
            of_logs()
    with pytest.raises(DataError, match="sums to 3.36, expected probabilities.$"):
        metrics.nll([[3.0, 0.36]], [0])


def test_metrics_are_a_mapping_that_survives_strict_json() -> None:
    found = Metrics({"nll": Interval(math.inf, 1.0, math.inf), "mcc": Interval(0.5, 0.25, 0.75)}, 10, 4, "sample")
    assert list(found) == ["nll", "mcc"] and len(found) == 2 and found["mcc"].value == 0.5
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text) == {
        "nll": {"value": "Infinity", "low": 1.0, "high": "Infinity"},
        "mcc": {"value": 0.5, "low": 0.25, "high": 0.75},
        "interval": "95 % basic bootstrap interval",
        "n": 10,
        "draws": 4,
        "method": "sample",
    }
    assert Metrics.from_dict(json.loads(text)) == found
    assert "mcc  0.5000 [0.2500, 0.7500]" in str(found)
    plain = metrics.classification(np.log([[0.5, 0.5]]), [0], intervals=False)["nll"]
    assert math.isnan(plain.low) and math.isnan(plain.high)
