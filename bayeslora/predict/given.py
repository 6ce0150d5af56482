"""What metrics are given: probabilities or their logarithms, real predictions and labels, in checked arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeslora.errors import DataError
from bayeslora.predict.resampling import Floats

__all__ = ["class_numbers", "classified", "distributions", "exponential", "in_the_middle", "paired"]


def distributions(probabilities: ArrayLike) -> Floats:
    """Probabilities (examples, classes).

    Raises:
        DataError: they have another shape, there are none, or a row does not sum to one.
    """
    rows = _table(probabilities)
    off = _off(rows)
    if len(off):
        with np.errstate(over="ignore"):
            hint = "" if len(_off(np.exp(rows))) else " These look like log-probabilities: give np.exp of them."
        found = f"{rows[off[0]]} sums to {rows[off[0]].sum():g}"
        raise DataError(f"Row {off[0]} is no probability distribution: {found}, expected probabilities.{hint}")
    return rows


def exponential(log_probabilities: ArrayLike) -> tuple[Floats, Floats]:
    """Probabilities (examples, classes), and their logarithms that are given.

    Raises:
        DataError: as in `distributions`.
    """
    logs = _table(log_probabilities)
    with np.errstate(over="ignore"):
        rows = np.exp(logs)
    off = _off(rows)
    if len(off):
        hint = "" if len(_off(logs)) else " These look like probabilities: give np.log of them."
        found = f"exp of {logs[off[0]]} sums to {rows[off[0]].sum():g}"
        raise DataError(f"Row {off[0]} is no probability distribution: {found}, expected log-probabilities.{hint}")
    return rows, logs


def _table(values: ArrayLike) -> Floats:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or not len(rows):
        raise DataError(f"Expected probabilities (examples, classes) of some examples, found shape {rows.shape}.")
    return rows


def _off(rows: Floats) -> NDArray[np.int64]:
    """Numbers of the rows that are no probability distributions."""
    # Rows in float32 over many classes sum to one within about 1e-6.
    return np.flatnonzero(~((rows >= 0).all(1) & (np.abs(rows.sum(1) - 1) < 1e-4)))


def classified(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    """Probabilities (examples, classes) and class numbers (examples,).

    Raises:
        DataError: as in `distributions` and `class_numbers`.
    """
    rows = distributions(probabilities)
    return rows, class_numbers(labels, *rows.shape)


def class_numbers(labels: ArrayLike, examples: int, classes: int) -> NDArray[np.int64]:
    """Class numbers (examples,).

    Raises:
        DataError: they are not as many, or out of range.
    """
    found = np.asarray(labels)
    if found.shape != (examples,):
        raise DataError(f"Expected {examples} labels, one for each row, found the shape {found.shape}.")
    wrong = np.flatnonzero((found < 0) | (found >= classes) | (found != np.floor(found)))
    if len(wrong):
        raise DataError(f"Label {found[wrong[0]]} of row {wrong[0]} is no class number from 0 to {classes - 1}.")
    return found.astype(np.int64)


def paired(predictions: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Real predictions and labels (examples,).

    Raises:
        DataError: there are none, or not as many.
    """
    predicted, real = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if predicted.shape != real.shape or real.ndim != 1 or not len(real):
        raise DataError(f"Expected as many predictions as labels, found the shapes {predicted.shape} and {real.shape}.")
    return predicted, real


def in_the_middle(below: ArrayLike, labels: Floats) -> Floats:
    """1 where a label is in the middle 90 % of its law, given the probabilities of what is below it, else 0.

    Raises:
        DataError: they are not as many as labels, or one is no probability.
    """
    found = np.asarray(below, dtype=np.float64)
    if found.shape != labels.shape:
        raise DataError(f"Expected {len(labels)} probabilities, one for each label, found the shape {found.shape}.")
    wrong = np.flatnonzero(~((found >= 0) & (found <= 1)))
    if len(wrong):
        raise DataError(f"Row {wrong[0]} has {found[wrong[0]]:g}, expected the probability of what is below its label.")
    return (np.abs(found - 0.5) <= 0.45).astype(np.float64)
