"""What probabilities are good for: to abstain, to tell classes apart fairly, to notice rows of another kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bayeslora.errors import DataError
from bayeslora.predict.prediction import ClassPrediction, Prediction
from bayeslora.predict.reliability import Guesses, guesses_of
from bayeslora.predict.resampling import Floats, bin_of, indicator
from bayeslora.predict.selective import risk_by_coverage

__all__ = ["ClassBins", "RiskCoverage", "by_class", "risk_coverage"]


@dataclass(frozen=True)
class RiskCoverage:
    """Errors among the rows of which a prediction is surest.

    Attributes:
        coverage: share of rows that are answered, the surest first (examples,).
        risk: share of wrong ones among them (examples,).
    """

    coverage: Floats
    risk: Floats

    @property
    def area(self) -> float:
        """Mean risk over all coverages (AURC): lower is better."""
        return float(self.risk.mean())


def risk_coverage(found: Prediction | Guesses) -> RiskCoverage:
    """The risk at each coverage, if rows are left unanswered by the probability of their best class, or token.

    Raises:
        DataError: the labels are not known, or are no classes.

    References:
        Geifman and El-Yaniv, *Selective classification for deep neural networks*, NeurIPS 2017.
    """
    guesses = guesses_of(found)
    return RiskCoverage(*risk_by_coverage(guesses.confidence, guesses.correct))


@dataclass(frozen=True)
class ClassBins:
    """Calibration of the probability of one class.

    Attributes:
        name: of the class.
        probability: mean probability in each bin that has rows (bins,).
        share: share of rows there that are of the class (bins,).
        rows: number of rows there (bins,).
    """

    name: str
    probability: Floats
    share: Floats
    rows: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error of the class's probability."""
        return float(self.rows @ np.abs(self.probability - self.share) / self.rows.sum())


def by_class(prediction: ClassPrediction, bins: int = 10) -> list[ClassBins]:
    """Calibration of each class's probability, in bins of equal width.

    Raises:
        DataError: the labels are not known, or are no classes.
    """
    probabilities, labels = _known(prediction)
    found = []
    for number, name in enumerate(prediction.names):
        members = indicator(bin_of(probabilities[:, number], bins), bins)
        members = members[:, members.sum(0) > 0]
        rows = members.sum(0)
        found.append(
            ClassBins(name, probabilities[:, number] @ members / rows, (labels == number) @ members / rows, rows)
        )
    return found


def _known(prediction: ClassPrediction) -> tuple[Floats, NDArray[np.int64]]:
    """Probabilities (examples, classes) and labels (examples,)."""
    if prediction.labels is None or not isinstance(prediction, ClassPrediction):
        raise DataError("Calibration needs predicted classes and their labels.")
    return prediction.probabilities.numpy(), prediction.labels.numpy()
