"""How much methods depend on settings: what they come to over a grid of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from bayeslora.app.studies.ranking import signed_rank

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["by_point", "robustness_of", "robustness_tests"]

#: Metrics that robustness is of, and those that are told of each point.
METRICS = ("accuracy", "nll")
OF_POINTS = (*METRICS, "ece_15")


def by_point(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Means over seeds at each point of a grid, of the points that have a result with every seed that was run.

    Args:
        frame: see `frame_of`.
        names: of the settings that the grid varies.
    """
    grid = frame[frame["protocol"] == "grid"]
    keys = ["task", "base", "method", *names]
    metrics = [name for name in OF_POINTS if name in grid]
    points = grid.groupby(keys, sort=False, dropna=False)  # no value is a value, too
    whole = grid[points["state"].transform(lambda states: (states == "done").all())]
    return whole.groupby(keys, sort=False, dropna=False, as_index=False)[metrics].mean()


def robustness_of(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """A row for each task, base and method: its metrics over the points of a grid.

    Columns: ``intrinsic``, 1 / median NLL, and ``extrinsic``, the median accuracy, as the authors of MonteCLoRA define
    them; of each metric the ``median``, the ``spread``, the best less the worst in absolute value, and ``iqr``, the
    interquartile range, such as ``nll_spread``; ``points`` that have a result; and ``failed``, those at which a fit or
    a prediction failed. A method that failed at all of them has a row as well.

    Args:
        frame: see `frame_of`.
        names: of the settings that the grid varies.

    References:
        Sengupta, Seth, Pathak, Raman, Gopalakrishnan and Chakraborty, *Robust and efficient fine-tuning of LLMs with
        Bayesian reparameterization of low-rank adaptation*, TMLR 2025.
    """
    import pandas as pd

    labels = ["task", "base", "method"]
    points = by_point(frame, names)
    rows = []
    for key, asked in frame[frame["protocol"] == "grid"].groupby(labels, sort=False):
        part = points[(points[labels] == list(key)).all(axis=1)]
        row = dict(zip(labels, key, strict=True))
        for name in METRICS:
            values = part[name].to_numpy() if name in part and len(part) else np.array([math.nan])
            low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
            row |= {f"{name}_median": median, f"{name}_spread": float(np.ptp(values)), f"{name}_iqr": high - low}
        row |= {"intrinsic": 1 / row["nll_median"], "extrinsic": row["accuracy_median"]}
        failed = asked[asked["state"] == "failed"][names].drop_duplicates()
        rows.append(row | {"points": len(part), "failed": len(failed)})
    return pd.DataFrame(rows)


def robustness_tests(robustness: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Wilcoxon's signed-rank test over tasks, of intrinsic and extrinsic robustness against the reference's.

    A method has a result on a task if it has as many points there as any: the median of those at which it did not fail
    is no match for that of all.
    """
    import pandas as pd

    rows, methods = [], robustness["method"].unique()
    whole = robustness[robustness["points"] == robustness.groupby(["task", "base"])["points"].transform("max")]
    for measure in ("intrinsic", "extrinsic"):
        values = whole.pivot(index=["task", "base"], columns="method", values=measure).reindex(columns=methods)
        for method in (name for name in methods if name != reference and reference in values):
            both = values[[method, reference]].dropna()
            p, pairs = signed_rank(both[method].to_numpy() - both[reference].to_numpy())
            rows.append({"measure": measure, "method": method, "wilcoxon": p, "pairs": pairs})
    return pd.DataFrame(rows)
