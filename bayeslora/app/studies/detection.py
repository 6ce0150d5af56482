"""What uncertainty is good for: to know rows of another kind, and one's own mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bayeslora.app.studies.results import Results
from bayeslora.app.studies.summary import groups_of
from bayeslora.predict.metrics import Metrics
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.selective import auroc, risk_by_coverage

if TYPE_CHECKING:
    import pandas as pd

    from bayeslora.app.studies.expansion import Target

__all__ = ["detection_of", "shift_of"]


def detection_of(targets: Sequence[Target], results: Results) -> pd.DataFrame:
    """A row for each group and what is to be detected, with means over seeds.

    Columns: labels; ``detected``, which is "mistakes", or the name of a shift, whose rows are to be told from those of
    the task; ``entropy`` and ``mutual_information``, the area under the ROC curve of each (0.5 is chance); and, of
    mistakes, ``risk``, the area under the curve of risk by coverage, by confidence.

    Args:
        targets: lines of a study.
        results: where they are.
    """
    import pandas as pd

    rows = []
    for group in groups_of(targets, results):
        found: dict[str, list[dict[str, float]]] = {}
        for target in group.lines:
            own = results.predicted(target)
            if isinstance(own, ClassPrediction):
                found.setdefault("mistakes", []).append(_mistakes(own))
                for name in filter(None, results.evaluations(target)):
                    other = results.predicted(target, name)
                    if isinstance(other, ClassPrediction):
                        found.setdefault(name, []).append(_rows_of_another_kind(own, other))
        for detected, each in found.items():
            means = {name: float(np.mean([values[name] for values in each])) for name in each[0]}
            rows.append(group.labels | {"detected": detected, "seeds": len(each)} | means)
    return pd.DataFrame(rows)


def shift_of(targets: Sequence[Target], results: Results) -> pd.DataFrame:
    """A row for each group and shift, with means of the metrics over seeds; empty if the study has no shifts."""
    import pandas as pd

    rows = []
    for group in groups_of(targets, results):
        found: dict[str, list[Metrics]] = {}
        for target in group.lines:
            for name, evaluated in results.evaluations(target).items():
                if name:
                    found.setdefault(name, []).append(Metrics.from_dict(evaluated["metrics"]))
        for name, each in found.items():
            means = {metric: float(np.mean([metrics[metric].value for metrics in each])) for metric in each[0]}
            rows.append(group.labels | {"shift": name, "rows": each[0].n, "seeds": len(each)} | means)
    return pd.DataFrame(rows)


def _mistakes(own: ClassPrediction) -> dict[str, float]:
    assert own.labels is not None
    wrong = (own.predictions != own.labels).numpy()
    entropy, information = own.entropy.numpy(), own.mutual_information.numpy()
    _, risk = risk_by_coverage(own.probabilities.amax(-1).numpy(), ~wrong)
    return {
        "entropy": auroc(entropy[~wrong], entropy[wrong]),
        "mutual_information": auroc(information[~wrong], information[wrong]),
        "risk": float(risk.mean()),
    }


def _rows_of_another_kind(own: ClassPrediction, other: ClassPrediction) -> dict[str, float]:
    return {
        "entropy": auroc(own.entropy.numpy(), other.entropy.numpy()),
        "mutual_information": auroc(own.mutual_information.numpy(), other.mutual_information.numpy()),
    }
