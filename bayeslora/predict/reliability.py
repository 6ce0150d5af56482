"""Reliability: how often best guesses are right, against how sure they were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeslora.errors import DataError
from bayeslora.predict.prediction import ClassPrediction, Prediction
from bayeslora.predict.resampling import Floats, bin_of, calibration, indicator, once

__all__ = ["Bins", "Guesses", "bin_guesses", "guesses_of"]

#: Of the normal law, 95 % lie between this quantile and its negative.
NORMAL = 1.959963984540054


@dataclass(frozen=True)
class Guesses:
    """Best guesses: how sure each was, and whether it was right.

    Attributes:
        confidence: probability of what was guessed (guesses,).
        correct: 1 where it was so, else 0 (guesses,).
        truth: true probability of what was guessed (guesses,), where it is known.
        least: confidence, less than which none can have.
        of: what is guessed.
        unit: what there is a guess of each.
    """

    of: ClassVar[str] = "predicted class"
    unit: ClassVar[str] = "rows"

    confidence: Floats
    correct: Floats
    truth: Floats | None = field(default=None, kw_only=True)
    least: float = field(default=0.0, kw_only=True)

    @property
    def groups(self) -> NDArray[np.int64]:
        """Number of the group of each (guesses,): guesses of different groups do not depend on each other."""
        return np.arange(len(self.confidence))

    @property
    def accuracy(self) -> float:
        """Share of those that were right."""
        return float(self.correct.mean())

    def ece(self, bins: int = 15) -> float:
        """Expected calibration error in bins of equal width."""
        return once(calibration(self.confidence, self.correct, bins), len(self.correct))


class Bins(NamedTuple):
    """Guesses by their confidence, in the bins that have some.

    Attributes:
        rows: number of guesses (bins,).
        confidence: mean probability of what was guessed.
        accuracy: share of those that were right.
        low: lower end of the 95 % Wilson interval of the accuracy.
        high: upper end.
        truth: mean true probability of what was guessed, if that is known.
        centre: middle of the bin.
    """

    rows: Floats
    confidence: Floats
    accuracy: Floats
    low: Floats
    high: Floats
    truth: Floats | None
    centre: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error over these bins."""
        return float(self.rows @ np.abs(self.accuracy - self.confidence) / self.rows.sum())


def guesses_of(found: Prediction | Guesses, truth: ArrayLike | None = None) -> Guesses:
    """The best guesses of a prediction.

    Args:
        found: a prediction of classes, with labels; guesses are what they are.
        truth: true class probabilities (examples, classes); by default those that come with the prediction.

    Raises:
        DataError: the prediction has no labels or no classes, or the true probabilities have another shape.
    """
    if isinstance(found, Guesses):
        return found
    if found.labels is None or not isinstance(found, ClassPrediction) or not len(found):
        raise DataError("Calibration needs predicted classes and their labels, or tokens.")
    probabilities = found.probabilities.numpy()
    best = probabilities.argmax(1)
    truth = found.truth if truth is None else truth
    true = None if truth is None else np.asarray(truth, dtype=np.float64)
    if true is not None and true.shape != probabilities.shape:
        raise DataError(f"True probabilities have the shape {true.shape}, predictions {probabilities.shape}.")
    return Guesses(
        probabilities.max(1),
        (best == found.labels.numpy()).astype(np.float64),
        truth=None if true is None else true[np.arange(len(true)), best],
        least=1 / probabilities.shape[1],
    )


def bin_guesses(guesses: Guesses, bins: int = 15) -> Bins:
    """What a reliability diagram shows.

    Guesses of one group, such as tokens of one text, depend on each other: a bin's interval is that of as many
    independent ones as would vary as these do.

    Args:
        guesses: those of a prediction (`guesses_of`), or of tokens.
        bins: number of bins of equal width.

    References:
        Dean and Pagano, *Evaluating confidence interval methods for binomial proportions in clustered surveys*, Journal
        of Survey Statistics and Methodology 2015 (Wilson's interval by the effective sample size).
    """
    place = bin_of(guesses.confidence, bins)
    members = indicator(place, bins)
    filled = members.sum(0) > 0
    rows = members.sum(0)[filled]

    def mean(values: Floats) -> Floats:
        return np.asarray((values @ members)[filled] / rows)

    accuracy = mean(guesses.correct)
    inside = [place == each for each in np.flatnonzero(filled)]
    low, high = _wilson(
        accuracy, np.array([_effective(guesses.correct[each], guesses.groups[each]) for each in inside])
    )
    truth = None if guesses.truth is None else mean(guesses.truth)
    centre = ((np.arange(bins) + 0.5) / bins)[filled]
    return Bins(rows, mean(guesses.confidence), accuracy, low, high, truth, centre)


def _effective(correct: Floats, groups: NDArray[np.int64]) -> float:
    """How many independent guesses vary as these do; as many as there are groups, where all are right or all wrong."""
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    share, n, several = correct.mean(), len(correct), len(sizes)
    if n == several:
        return n
    residuals = np.bincount(group, correct - share)
    variance = several / max(several - 1, 1) * float(residuals @ residuals) / n**2
    return float(np.clip(share * (1 - share) / variance, 1, n)) if variance > 0 else several


def _wilson(share: Floats, n: Floats) -> tuple[Floats, Floats]:
    """Ends of the 95 % Wilson interval of a share of n."""
    square = NORMAL**2 / n
    centre = (share + square / 2) / (1 + square)
    reach = np.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    # No rounding may put the share itself outside.
    return np.minimum(np.maximum(centre - reach, 0), share), np.maximum(np.minimum(centre + reach, 1), share)
