"""What uncertainty tells apart: rows of one kind from those of another, and right answers from wrong ones."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.predict.resampling import Floats

__all__ = ["auroc", "risk_by_coverage"]


def auroc(negatives: ArrayLike, positives: ArrayLike) -> float:
    """Probability that a positive has the higher score, ties counted half: the area under the ROC curve.

    NaN where there is none of one kind.
    """
    from scipy import stats

    low, high = np.asarray(negatives, dtype=np.float64), np.asarray(positives, dtype=np.float64)
    if not len(low) or not len(high):
        return math.nan
    return float(stats.mannwhitneyu(high, low).statistic / (len(low) * len(high)))


def risk_by_coverage(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """Share of the rows that are kept, the surest ones, and the share of mistakes among them (both (rows,)).

    Rows of equal confidence stand in no order: each counts as their mean.

    References:
        Geifman and El-Yaniv, *Selective classification for deep neural networks*, NeurIPS 2017.
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    order = np.argsort(-sure, kind="stable")
    _, tie, sizes = np.unique(-sure[order], return_inverse=True, return_counts=True)
    wrong = (np.bincount(tie, 1 - right[order]) / sizes)[tie]
    kept = np.arange(1, len(order) + 1)
    return kept / len(order), np.cumsum(wrong) / kept
