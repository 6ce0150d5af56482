"""What metrics are given: probabilities or their logarithms, real predictions and labels, in checked arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeslora.errors import DataError
from bayeslora.predict.resampling import Floats

__all__ = ["classified", "distributions", "exponential", "paired"]


def distributions(probabilities: ArrayLike) -> Floats:
    """Probabilities (examples, classes).

    Raises:
        DataError: they have another shape, there are none, or a row does not sum to one.
    """
    rows = np.asarray(probabilities, dtype=np.float64)
    if rows.ndim != 2 or not len(rows):
        raise DataError(f"Expected probabilities (examples, classes) of some examples, found shape {rows.shape}.")
    off = _off(rows)
    if len(off):
        with np.errstate(over="ignore"):
            hint = "" if len(_off(np.exp(rows))) else " These look like log-probabilities: give np.exp of them."
        found = f"{rows[off[0]]} sums to {rows[off[0]].sum():g}"
        raise DataError(f"Row {off[0]} is no probability distribution: {found}, expected probabilities.{hint}")
    return rows


def exponential(logs: Floats) -> Floats:
    """Probabilities of their logarithms (examples, classes); another shape is left to `distributions`.

    Raises:
        DataError: the probabilities of a row do not sum to one.
    """
    rows = np.exp(logs)
    if logs.ndim == 2 and len(off := _off(rows)):
        hint = "" if len(_off(logs)) else " These look like probabilities: give np.log of them."
        found = f"exp of {logs[off[0]]} sums to {rows[off[0]].sum():g}"
        raise DataError(f"Row {off[0]} is no probability distribution: {found}, expected log-probabilities.{hint}")
    return rows


def _off(rows: Floats) -> NDArray[np.int64]:
    """Numbers of the rows that are no probability distributions."""
    # Rows in float32 over many classes sum to one within about 1e-6.
    return np.flatnonzero(~((rows >= 0).all(1) & (np.abs(rows.sum(1) - 1) < 1e-4)))


def classified(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    """Probabilities (examples, classes) and class numbers (examples,).

    Raises:
        DataError: as in `distributions`; or labels are not as many, or out of range.
    """
    rows = distributions(probabilities)
    classes = np.asarray(labels)
    if classes.shape != (len(rows),):
        raise DataError(f"Expected {len(rows)} labels, one for each row, found the shape {classes.shape}.")
    wrong = np.flatnonzero((classes < 0) | (classes >= rows.shape[1]) | (classes != np.floor(classes)))
    if len(wrong):
        raise DataError(
            f"Label {classes[wrong[0]]} of row {wrong[0]} is no class number from 0 to {rows.shape[1] - 1}."
        )
    return rows, classes.astype(np.int64)


def paired(predictions: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Real predictions and labels (examples,).

    Raises:
        DataError: there are none, or not as many.
    """
    predicted, real = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if predicted.shape != real.shape or real.ndim != 1 or not len(real):
        raise DataError(f"Expected as many predictions as labels, found the shapes {predicted.shape} and {real.shape}.")
    return predicted, real
