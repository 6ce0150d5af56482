"""The true probabilities of rows that were drawn from known ones, beside what was predicted of these."""

from __future__ import annotations

from dataclasses import replace

import torch

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
    """
    if not isinstance(prediction, ClassPrediction) or "probabilities" not in rows.dataset.column_names:
        return prediction
    truth = torch.tensor(rows.dataset["probabilities"], dtype=torch.float64)
    known, names = rows.spec.labels, prediction.label_names
    if known and not set(known) - set(names):
        truth = torch.nn.functional.pad(truth, (0, 1))
        truth = truth[:, [known.index(name) if name in known else -1 for name in names]]
    return replace(prediction, truth=truth)
