"""Statistics of rows that may count several times, and bootstrap intervals made of them.

A `Statistic` is a function of how often each row counts, so that its value on the rows (each counts once) and
on every resample come from the same formula, and none is ever a mean of means of batches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bounded", "Floats", "Interval", "Statistic", "bootstrap"]

Floats: TypeAlias = NDArray[np.float64]
#: Multiplicity of every row in every resample (resamples, rows) -> value of every resample (resamples,).
Statistic: TypeAlias = Callable[[Floats], Floats]
#: A statistic, its least and its greatest possible value.
Bounded: TypeAlias = tuple[Statistic, float, float]

RESAMPLES, LEVEL = 1000, 0.95
#: What the ends of every interval are.
INTERVAL = f"{LEVEL:.0%} basic bootstrap interval".replace("%", " %")
CHUNK = 2**16  # multiplicities held at once: they fit into a cache


@dataclass(frozen=True)
class Interval:
    """A metric and its bootstrap interval; the ends are NaN where none was asked for.

    Attributes:
        value: the metric on all rows.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if math.isnan(self.low) else f" [{self.low:.4f}, {self.high:.4f}]")


def bootstrap(
    table: Mapping[str, Bounded],
    n: int,
    seed: int,
    intervals: bool,
) -> dict[str, Interval]:
    """Values with 95 % basic intervals over resamples of the ``n`` rows, the same resamples for every statistic.

    The basic interval mirrors the resamples at the value: a calibration error is larger on resamples than on the rows
    themselves, as it is on these than in truth, and percentiles of the resamples would miss a small one nearly always.
    It is cut at the bounds of the statistic, and extended to hold the value. Where all rows are right, or none is, so
    is every resample: the other end of a `Share` is that of Clopper and Pearson then. An interval tells what other rows
    would change, not what another seed of training would. One row has none, and its ends are NaN where a resample has
    no value, as has a correlation of few rows.

    Args:
        table: statistics by name.
        n: number of rows.
        seed: of the resamples.
        intervals: make them.

    References:
        Efron and Tibshirani, *An introduction to the bootstrap*, 1993, chapter 13; Clopper and Pearson, *The use of
        confidence or fiducial limits*, Biometrika 1934.
    """
    values = {name: once(statistic, n) for name, (statistic, _, _) in table.items()}
    if not intervals or n == 1:
        return {name: Interval(value) for name, value in values.items()}

    def resampled(rows: NDArray[np.int64], axis: int) -> Floats:  # (..., rows) -> (statistics, ...)
        flat = rows.reshape(-1, n)
        cells = flat + n * np.arange(len(flat))[:, None]
        counts = np.bincount(cells.ravel(), minlength=flat.size).reshape(flat.shape).astype(np.float64)
        found = [statistic(counts) for statistic, _, _ in table.values()]
        return np.stack(found).reshape(len(table), *rows.shape[:-1])

    from scipy import stats

    with np.errstate(invalid="ignore"), warnings.catch_warnings():  # infinite or undefined values
        warnings.simplefilter("ignore", (stats.DegenerateDataWarning, RuntimeWarning))
        low, high = stats.bootstrap(
            (np.arange(n),), resampled, n_resamples=RESAMPLES, batch=max(1, CHUNK // n), vectorized=True,
            confidence_level=LEVEL, method="basic", rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return {
        name: _within(values[name], low[place], high[place], least, greatest, n * isinstance(statistic, Share))
        for place, (name, (statistic, least, greatest)) in enumerate(table.items())
    }


def once(statistic: Statistic, n: int) -> float:
    """A statistic with every row counted once."""
    return float(statistic(np.ones((1, n)))[0]) + 0.0  # no negative zero


def mean(scores: Floats) -> Statistic:
    """Mean of one score a row; infinite as soon as a row with an infinite score counts."""
    infinite = np.isinf(scores)
    finite = np.where(infinite, 0.0, scores)

    def statistic(counts: Floats) -> Floats:
        return np.where((counts[:, infinite] > 0).any(1), np.inf, counts @ finite / counts.sum(1))

    return statistic


class Share:
    """Share of what is right, a `mean` of numbers from 0 to 1.

    Args:
        right: 1 where a row is right, 0 where it is wrong, or the share of its texts that are right.
    """

    def __init__(self, right: Floats) -> None:
        self.right = right
        self._mean = mean(right)

    def __call__(self, counts: Floats) -> Floats:
        return self._mean(counts)


def average(statistics: Sequence[Statistic]) -> Statistic:
    """Mean of statistics of the same rows, which of shares is one."""
    shares = [each.right for each in statistics if isinstance(each, Share)]
    if len(shares) == len(statistics) and len({len(right) for right in shares}) == 1:
        return Share(np.mean(shares, axis=0))
    return lambda counts: np.asarray(np.mean([statistic(counts) for statistic in statistics], axis=0))


def root_mean(scores: Floats) -> Statistic:
    """Square root of the mean of one score a row."""
    mean_score = mean(scores)
    return lambda counts: np.sqrt(mean_score(counts))


def ratio(scores: Floats, sizes: Floats) -> Statistic:
    """Sum of one score a row over the sum of the rows' sizes."""
    return lambda counts: counts @ scores / (counts @ sizes)


def perplexity(scores: Floats, tokens: Floats) -> Statistic:
    """Exponential of the sum of one score a row, in nats, over the sum of the rows' numbers of tokens."""
    mean_score, mean_tokens = mean(scores), mean(tokens)
    return lambda counts: np.exp(mean_score(counts) / mean_tokens(counts))


def calibration(confidence: Floats, correctness: Floats, bins: int, rows: NDArray[np.int64] | None = None) -> Statistic:
    """Sum over bins of |sum of (correctness - confidence)| / parts, in bins of equal width.

    Args:
        confidence: probability of what is predicted (parts,).
        correctness: 1 where it was the label, else 0, or its true probability (parts,).
        bins: their number; a bin includes its upper edge.
        rows: number of the row that each is a part of (parts,), as tokens are of texts: it counts as often as its row.
            By default each is a row.
    """
    rows = np.arange(len(confidence)) if rows is None else rows
    sizes = np.bincount(rows)
    cells = bins * rows + bin_of(confidence, bins)
    gaps = np.bincount(cells, correctness - confidence, minlength=bins * len(sizes)).reshape(-1, bins)
    return lambda counts: np.abs(counts @ gaps).sum(1) / (counts @ sizes)


def calibration_by_chance(confidence: Floats, bins: int) -> Statistic:
    """What `calibration` is on average where rows are right as often as they are sure, each for itself.

    The sum of (correctness - confidence) in a bin is taken as normal, and its mean size as no more than that of its
    rows one by one, which it is where hardly any is unsure.
    """
    members = indicator(bin_of(confidence, bins), bins) * (confidence * (1 - confidence))[:, None]

    def statistic(counts: Floats) -> Floats:
        variances = counts @ members
        return np.asarray(np.minimum(np.sqrt(2 * variances / np.pi), 2 * variances).sum(1) / counts.sum(1))

    return statistic


def calibration_adaptive(confidence: Floats, correctness: Floats, bins: int) -> Statistic:
    """The same in bins of equally many rows; rows of equal confidence share the bin of their middle rank."""
    ties = Ties(confidence)

    def statistic(counts: Floats) -> Floats:
        resamples, rows = len(counts), counts.sum(1, keepdims=True)
        sizes = ties.sums(counts)
        # A quotient of whole numbers: no rounding decides a bin. Ties of no rows at the end lie beyond the last.
        binned = (bins * (2 * np.cumsum(sizes, axis=1) - sizes) / (2 * rows)).astype(np.int64)
        cells = np.minimum(binned, bins - 1) + bins * np.arange(resamples)[:, None]
        gaps = ties.sums(counts * (correctness - confidence))
        totals = np.bincount(cells.ravel(), gaps.ravel(), minlength=bins * resamples)
        return np.asarray(np.abs(totals.reshape(resamples, bins)).sum(1) / rows[:, 0])

    return statistic


def matthews(predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> Statistic:
    """Correlation of two class numbers a row; zero where one of them is constant."""
    correct = (predicted == labels).astype(np.float64)
    is_label, is_predicted = indicator(labels, classes), indicator(predicted, classes)

    def statistic(counts: Floats) -> Floats:
        rows, true, guessed = counts.sum(1), counts @ is_label, counts @ is_predicted
        covariance = (counts @ correct) * rows - (true * guessed).sum(1)
        variances = (rows**2 - (true**2).sum(1)) * (rows**2 - (guessed**2).sum(1))
        return np.divide(covariance, np.sqrt(variances), out=np.zeros(len(counts)), where=variances > 0)

    return statistic


def correlation(first: Floats, second: Floats) -> Statistic:
    """Pearson correlation of two values a row; NaN where one of them is constant."""
    return lambda counts: _correlation(counts, first, second)


def rank_correlation(first: Floats, second: Floats) -> Statistic:
    """Pearson correlation of the ranks of two values a row, ties at their mean rank."""
    ties = Ties(first), Ties(second)
    return lambda counts: _correlation(counts, ties[0].ranks(counts), ties[1].ranks(counts))


class Ties:
    """Rows in ascending order of a value, rows of equal value as one tie."""

    def __init__(self, values: Floats) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        _, self.starts, self.tie_of = np.unique(ordered, return_index=True, return_inverse=True)

    def sums(self, weights: Floats) -> Floats:
        """Weights (resamples, rows) summed over each tie: (resamples, ties)."""
        return np.asarray(np.add.reduceat(weights[:, self.order], self.starts, axis=1))

    def ranks(self, counts: Floats) -> Floats:
        """Mean rank of each row's tie in each resample (resamples, rows), up to a constant."""
        sizes = self.sums(counts)
        middles = np.cumsum(sizes, axis=1) - sizes / 2
        ranks = np.empty_like(counts)
        ranks[:, self.order] = middles[:, self.tie_of]
        return ranks


def bin_of(confidence: Floats, bins: int) -> NDArray[np.int64]:
    """Number of each row's bin of equal width; bins include their upper edge, the first one zero as well."""
    return np.asarray(np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left"))


def indicator(classes: NDArray[np.int64], width: int) -> Floats:
    """One-hot rows (rows, width)."""
    return np.eye(width)[classes]


def _correlation(counts: Floats, first: Floats, second: Floats) -> Floats:
    """Pearson correlation in each resample of values (rows,) or (resamples, rows)."""
    rows = counts.sum(1, keepdims=True)
    x, y = (values - (counts * values).sum(1, keepdims=True) / rows for values in (first, second))
    x_norm, y_norm = (np.sqrt((counts * centred**2).sum(1)) for centred in (x, y))
    # What rounding leaves of a constant is no variance.
    x_least, y_least = (1e-13 * np.abs(values).max() * np.sqrt(rows[:, 0]) for values in (first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (counts * x * y).sum(1) / (x_norm * y_norm)
    return np.where((x_norm <= x_least) | (y_norm <= y_least), np.nan, found)


def _within(value: float, low: float, high: float, least: float, greatest: float, share_of: int) -> Interval:
    """An interval within the bounds that holds the value; what mirrors the infinite is not known.

    ``share_of`` is the number of rows that the value is a `Share` of, 0 if it is none.
    """
    if share_of and value in (0, 1):
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / share_of)
        low, high = value - unseen, value + unseen
    low, high = np.clip([low, high], least, greatest)
    if math.isinf(value):
        low, high = math.nan, value
    return Interval(value, float(np.minimum(low, value)), float(np.maximum(high, value)))
