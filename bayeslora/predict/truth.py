"""The true probabilities of rows that were drawn from known ones, beside what was predicted of these."""

from __future__ import annotations

import reprlib
from dataclasses import replace

import torch

from bayeslora.errors import DataError
from bayeslora.predict.prediction import ClassPrediction, Prediction
from bayeslora.tasks import Split

__all__ = ["with_truth"]


def with_truth(prediction: Prediction, rows: Split) -> Prediction:
    """The same prediction with the true probabilities of the classes, where the rows say them.

    They do in a column "probabilities", in the order of the task's classes; a network may have its own, and one more
    for all that is no class's answer, which is never true.

    Args:
        prediction: of ``rows``.
        rows: that were predicted.

    Raises:
        DataError: the column holds something else than a number for each class.
    """
    if not isinstance(prediction, ClassPrediction) or "probabilities" not in rows.dataset.column_names:
        return prediction
    known, names = rows.spec.labels, prediction.label_names
    found, classes = rows.dataset["probabilities"], len(known) or prediction.outputs.shape[-1]
    try:
        truth = torch.tensor(found, dtype=torch.float64)
    except (TypeError, ValueError):  # texts, no values, or lists of several lengths
        truth = torch.empty(0)
    if truth.shape != (len(rows), classes):
        raise DataError(
            f"Column 'probabilities' of split '{rows.name}' begins with {reprlib.repr(found[0])}, expected lists of "
            f"the true probabilities of {classes} classes: if it is something else, call it otherwise."
        )
    if known and not set(known) - set(names):
        truth = torch.nn.functional.pad(truth, (0, 1))
        truth = truth[:, [known.index(name) if name in known else -1 for name in names]]
    return replace(prediction, truth=truth)
