"""Methods over all tasks: their ranks, and whether one is better than the reference on more tasks than chance gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bayeslora.app.studies.summary import BETTER

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ranking_of", "signed_rank"]

#: Beyond which differences are those of rounding.
DIGITS = 6


def ranking_of(summary: pd.DataFrame, reference: str) -> pd.DataFrame:
    """A row for each protocol, metric and method.

    Columns: ``rank``, the mean over tasks of the method's rank (1 is best, ties share theirs), over the ``tasks`` (with
    each base one) on which all methods have a result; and ``wilcoxon``, the two-sided p-value of Wilcoxon's signed-rank
    test of its means against the reference's over the ``pairs`` of tasks that both have. A method has a result on a
    task if it has as many seeds there as any: the mean of those that did not fail is no match for that of all.

    Args:
        summary: see `summary_of`.
        reference: method that the others are compared with.
    """
    import pandas as pd

    rows = []
    compared = summary[summary["metric"].isin(BETTER)]
    for (protocol, metric), part in compared.groupby(["protocol", "metric"], sort=False):
        methods = part["method"].unique()
        whole = part[part["seeds"] == part.groupby(["task", "base"])["seeds"].transform("max")]
        values = whole.pivot(index=["task", "base"], columns="method", values="value").reindex(columns=methods)
        values = values.round(DIGITS)
        shared = values.dropna()
        ranks = shared.rank(axis=1, ascending=not BETTER[metric]).mean()
        for method in values.columns:
            p, pairs = math.nan, 0
            if method != reference and reference in values.columns:
                both = values[[method, reference]].dropna()
                p, pairs = signed_rank(both[method].to_numpy() - both[reference].to_numpy())
            rows.append(
                {
                    "protocol": protocol, "metric": metric, "method": method, "rank": ranks[method],
                    "tasks": len(shared), "wilcoxon": p, "pairs": pairs,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def signed_rank(differences: Sequence[float] | np.ndarray) -> tuple[float, int]:
    """Two-sided p-value of Wilcoxon's signed-rank test, and the number of differences that are known and not zero.

    An infinite one, of a method that was sure of what is wrong, ranks above all others. With fewer than six no p-value
    can be below 0.05, whatever the differences.

    References:
        Wilcoxon, *Individual comparisons by ranking methods*, Biometrics Bulletin 1945; Demsar, *Statistical
        comparisons of classifiers over multiple data sets*, JMLR 2006.
    """
    from scipy import stats

    found = np.asarray(differences, dtype=np.float64).round(DIGITS)  # what rounding leaves of a tie is none
    found = found[~np.isnan(found) & (found != 0)]
    if not len(found):
        return math.nan, 0
    return float(stats.wilcoxon(found).pvalue), len(found)
