"""All that is measured of a prediction of some rows: one place for tables, files, pictures and comparisons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bayeslora.predict.metrics import Metrics
from bayeslora.predict.prediction import ClassPrediction, Prediction
from bayeslora.predict.resampling import bootstrap
from bayeslora.tasks import Split

__all__ = ["measure", "true_probabilities"]


def measure(prediction: Prediction, rows: Split, seed: int = 0) -> Metrics:
    """Metrics of a prediction, and its distance from the true probabilities where the rows say them.

    Args:
        prediction: of ``rows``, whose labels are known.
        rows: that were predicted.
        seed: of the resamples that intervals are made of.

    Raises:
        DataError: the labels are not known.
    """
    if not isinstance(prediction, ClassPrediction) or (truth := true_probabilities(rows, prediction)) is None:
        return prediction.metrics(seed=seed)
    found = bootstrap(prediction.statistics(truth), len(prediction), seed, True)
    return Metrics(found, len(prediction), prediction.draws, prediction.method)


def true_probabilities(rows: Split, prediction: Prediction) -> NDArray[np.float64] | None:
    """True class probabilities (rows, classes) in the prediction's order of classes, if the rows say them.

    They do in a column "probabilities", in the order of the task's classes; a network may have its own, and one more
    for all that is no class's answer, which is never true.
    """
    if "probabilities" not in rows.dataset.column_names:
        return None
    truth = np.asarray(rows.dataset["probabilities"], dtype=np.float64)
    known, names = rows.spec.labels, getattr(prediction, "label_names", ())
    if not known or set(known) - set(names):
        return truth
    return np.pad(truth, ((0, 0), (0, 1)))[:, [known.index(name) if name in known else -1 for name in names]]
