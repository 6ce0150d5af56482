"""How good predictions are: metrics over all rows at once, each with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeslora.errors import DataError
from bayeslora.predict import resampling
from bayeslora.predict.given import class_numbers, classified, distributions, exponential, in_the_middle, paired
from bayeslora.predict.resampling import INTERVAL, Bounded, Floats, Interval, bootstrap, once

__all__ = [
    "Interval",
    "Metrics",
    "accuracy",
    "against_truth",
    "brier",
    "class_statistics",
    "classification",
    "ece",
    "ece_adaptive",
    "ece_by_chance",
    "mcc",
    "nll",
    "pearson",
    "regression",
    "rmse",
    "sequence_statistics",
    "spearman",
    "value_statistics",
]

BINS = (10, 15, 20)  # the literature uses all three, and values of different numbers of bins do not compare


@dataclass(frozen=True)
class Metrics(Mapping[str, Interval]):
    """Metrics of one prediction by name.

    Attributes:
        intervals: name to value and interval.
        n: number of rows.
        draws: number of weight draws that were averaged.
        method: name of the way to predict; see `Posterior.predictors`.
    """

    intervals: Mapping[str, Interval] = field(default_factory=dict)
    n: int = 0
    draws: int = 1
    method: str = "sample"

    def __getitem__(self, name: str) -> Interval:
        return self.intervals[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.intervals)

    def __len__(self) -> int:
        return len(self.intervals)

    def __repr__(self) -> str:
        width = max((len(name) for name in self), default=0)
        lines = [f"{name:<{width}}  {interval}" for name, interval in self.items()]
        return "\n".join([*lines, f"{self.n} rows, draws={self.draws}, method={self.method}; [{INTERVAL}]"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that JSON lacks become "Infinity", "-Infinity" and "NaN"."""
        plain: dict[str, Any] = {
            name: {end: number_to_json(number) for end, number in asdict(interval).items()}
            for name, interval in self.items()
        }
        return plain | {"interval": INTERVAL, "n": self.n, "draws": self.draws, "method": self.method}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Metrics:
        """The metrics that `to_dict` wrote."""
        intervals = {
            name: Interval(**{end: float(number) for end, number in value.items()})
            for name, value in plain.items()
            if isinstance(value, Mapping)
        }
        return cls(intervals, plain["n"], plain["draws"], plain["method"])


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows (examples, classes) whose most probable class is the label (examples,)."""
    rows, classes = classified(probabilities, labels)
    return once(resampling.mean(_correct(rows, classes)), len(rows))


def nll(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean of -log p(label), in nats; infinite where a label got no probability at all."""
    rows, classes = classified(probabilities, labels)
    with np.errstate(divide="ignore"):
        return once(resampling.mean(-np.log(_at(rows, classes))), len(rows))


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared distance of the probabilities from the one-hot label, summed over classes (0 to 2)."""
    rows, classes = classified(probabilities, labels)
    return once(resampling.mean(_squared_distance(rows, classes)), len(rows))


def ece(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of the most probable class (Guo et al. 2017, equation 3).

    Bins have equal width and include their upper edge: a confidence of exactly 1 lies in the last one.
    """
    rows, classes = classified(probabilities, labels)
    return once(resampling.calibration(rows.max(1), _correct(rows, classes), bins), len(rows))


def ece_adaptive(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error over bins of equally many rows (Nguyen and O'Connor 2015).

    Rows of equal confidence share a bin, so the value does not depend on the order of rows.
    """
    rows, classes = classified(probabilities, labels)
    return once(resampling.calibration_adaptive(rows.max(1), _correct(rows, classes), bins), len(rows))


def ece_by_chance(probabilities: ArrayLike, bins: int = 15) -> float:
    """The `ece` that so many rows have on average if the probabilities (examples, classes) are true.

    Labels are drawn, so that a gap stays in every bin. After Bröcker and Smith, *Increasing the reliability of
    reliability diagrams*, Weather and Forecasting 2007, with gaps that are normal in place of simulated ones: within
    3 % from 200 rows on, and up to a tenth too little of 20.
    """
    rows = distributions(probabilities)
    return once(resampling.calibration_by_chance(rows.max(1), bins), len(rows))


def mcc(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation of label and most probable class; for more than two classes by Gorodkin (2004).

    Zero where the labels or the predictions are all of one class.
    """
    rows, classes = classified(probabilities, labels)
    return once(resampling.matthews(rows.argmax(1), classes, rows.shape[1]), len(rows))


def rmse(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Root of the mean squared error, in units of the label."""
    predicted, real = paired(predictions, labels)
    return once(resampling.root_mean((predicted - real) ** 2), len(real))


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson correlation; NaN where either is constant."""
    predicted, real = paired(predictions, labels)
    return once(resampling.correlation(predicted, real), len(real))


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson correlation of ranks, ties at their mean rank; NaN where either is constant."""
    predicted, real = paired(predictions, labels)
    return once(resampling.rank_correlation(predicted, real), len(real))


def classification(
    log_probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    truth: ArrayLike | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> dict[str, Interval]:
    """All metrics of a classifier: the values of `class_statistics`, whose arguments and errors it has.

    Args:
        log_probabilities: see there, as the next two.
        labels: of the rows.
        truth: true probabilities.
        intervals: make 95 % bootstrap intervals as well; see `bootstrap`.
        seed: of the resamples.
    """
    return bootstrap(class_statistics(log_probabilities, labels, truth), len(np.asarray(labels)), seed, intervals)


def class_statistics(
    log_probabilities: ArrayLike, labels: ArrayLike, truth: ArrayLike | None = None
) -> dict[str, Bounded]:
    """All metrics of a classifier, as statistics of how often each row counts.

    Args:
        log_probabilities: logarithms of the predicted probabilities (examples, classes), so that the NLL of a
            very small probability is right.
        labels: class numbers (examples,).
        truth: true probabilities (examples, classes), where they are known: `against_truth` comes with the others.

    Raises:
        DataError: no rows, shapes that differ, probabilities that do not sum to one, or labels out of range.
    """
    rows, logs = exponential(log_probabilities)
    classes = class_numbers(labels, *rows.shape)
    confidence, correct = rows.max(1), _correct(rows, classes)
    return {
        "accuracy": (resampling.Share(correct), 0.0, 1.0),
        "nll": (resampling.mean(-_at(logs, classes)), 0.0, math.inf),
        "brier": (resampling.mean(_squared_distance(rows, classes)), 0.0, 2.0),
        **{f"ece_{bins}": (resampling.calibration(confidence, correct, bins), 0.0, 1.0) for bins in BINS},
        "ece_15_by_chance": (resampling.calibration_by_chance(confidence, 15), 0.0, 1.0),
        "ece_adaptive": (resampling.calibration_adaptive(confidence, correct, 15), 0.0, 1.0),
        "mcc": (resampling.matthews(rows.argmax(1), classes, rows.shape[1]), -1.0, 1.0),
        **({} if truth is None else _distances(rows, logs, truth)),
    }


def regression(
    predictions: ArrayLike,
    log_densities: ArrayLike,
    labels: ArrayLike,
    *,
    below: ArrayLike | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> dict[str, Interval]:
    """All metrics of a prediction of real labels: the values of `value_statistics`, whose errors it has.

    Args:
        predictions: predictive means (examples,).
        log_densities: log predictive density of each label (examples,), in nats.
        labels: real labels (examples,).
        below: predicted probabilities that a label is below what it is (examples,), where they are known:
            ``coverage_90`` comes with the others.
        intervals: make 95 % bootstrap intervals as well; see `bootstrap`.
        seed: of the resamples.
    """
    table = value_statistics(predictions, log_densities, labels, below)
    return bootstrap(table, len(np.asarray(labels)), seed, intervals)


def value_statistics(
    predictions: ArrayLike, log_densities: ArrayLike, labels: ArrayLike, below: ArrayLike | None = None
) -> dict[str, Bounded]:
    """All metrics of a prediction of real labels, as statistics of how often each row counts.

    ``coverage_90`` is the share of labels in the middle 90 % of what is predicted of them, 0.9 if that is true.

    Args:
        predictions: predictive means (examples,).
        log_densities: log predictive density of each label (examples,), in nats.
        labels: real labels (examples,).
        below: predicted probabilities that a label is below what it is (examples,), where they are known.

    Raises:
        DataError: no rows, or shapes that differ.
    """
    predicted, real = paired(predictions, labels)
    coverage = {} if below is None else {"coverage_90": (resampling.Share(in_the_middle(below, real)), 0.0, 1.0)}
    return {
        "rmse": (resampling.root_mean((predicted - real) ** 2), 0.0, math.inf),
        "nll": (resampling.mean(-np.asarray(log_densities, dtype=np.float64)), -math.inf, math.inf),
        "pearson": (resampling.correlation(predicted, real), -1.0, 1.0),
        "spearman": (resampling.rank_correlation(predicted, real), -1.0, 1.0),
        **coverage,
    }


def sequence_statistics(log_densities: ArrayLike, tokens: ArrayLike) -> dict[str, Bounded]:
    """All metrics of the likelihood of sequences, as statistics of how often each of them counts.

    ``nll`` is that of a whole row on average, ``perplexity`` of a token: exp of all rows' over the tokens of all rows.

    Args:
        log_densities: log predictive density of each sequence (examples,), in nats.
        tokens: number of tokens of each (examples,).

    Raises:
        DataError: no rows, or shapes that differ.
    """
    density, counted = paired(log_densities, tokens)
    return {
        "nll": (resampling.mean(-density), 0.0, math.inf),
        "perplexity": (resampling.perplexity(-density, counted), 1.0, math.inf),
    }


def against_truth(
    log_probabilities: ArrayLike, truth: ArrayLike, *, intervals: bool = True, seed: int = 0
) -> dict[str, Interval]:
    """Distance of predictions from known class probabilities, free of the noise of drawn labels.

    ``kl`` is the mean Kullback-Leibler divergence KL(truth, prediction) in nats; ``ece_true`` the calibration
    error (15 bins) in which the true probability of the predicted class stands for whether it was the label.

    Args:
        log_probabilities: logarithms of the predicted probabilities (examples, classes).
        truth: true probabilities (examples, classes).
        intervals: make 95 % bootstrap intervals as well; see `bootstrap`.
        seed: of the resamples.

    Raises:
        DataError: no rows, shapes that differ, or rows that do not sum to one.
    """
    rows, logs = exponential(log_probabilities)
    return bootstrap(_distances(rows, logs, truth), len(logs), seed, intervals)


def _distances(rows: Floats, logs: Floats, truth: ArrayLike) -> dict[str, Bounded]:
    true = distributions(truth)
    if rows.shape != true.shape:
        raise DataError(f"Predictions have the shape {rows.shape}, true probabilities {true.shape}.")
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(true > 0, true * (np.log(true) - logs), 0.0)
    return {
        "kl": (resampling.mean(terms.sum(1)), 0.0, math.inf),
        "ece_true": (resampling.calibration(rows.max(1), _at(true, rows.argmax(1)), 15), 0.0, 1.0),
    }


def _at(rows: Floats, classes: NDArray[np.int64]) -> Floats:
    return np.asarray(rows[np.arange(len(rows)), classes])


def _correct(rows: Floats, classes: NDArray[np.int64]) -> Floats:
    return (rows.argmax(1) == classes).astype(np.float64)


def _squared_distance(rows: Floats, classes: NDArray[np.int64]) -> Floats:
    return np.asarray(((rows - resampling.indicator(classes, rows.shape[1])) ** 2).sum(1))


def number_to_json(number: float) -> float | str:
    """A number as JSON has it; those that JSON lacks as "Infinity", "-Infinity" and "NaN"."""
    if math.isnan(number):
        return "NaN"
    return number if math.isfinite(number) else ("Infinity" if number > 0 else "-Infinity")
