"""What methods come to over seeds and rows, and by how much they differ from a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from bayeslora.app.studies.expansion import Target
from bayeslora.app.studies.results import Results
from bayeslora.predict import resampling
from bayeslora.predict.resampling import Bounded, Interval, bootstrap

if TYPE_CHECKING:
    import pandas as pd


__all__ = ["BETTER", "Group", "groups_of", "over_seeds", "summary_of"]

#: Metrics of the tables by which methods are compared, and whether more of each is better.
BETTER = {
    "accuracy": True, "mcc": True, "nll": False, "perplexity": False, "ece_15": False, "brier": False, "rmse": False,
    "pearson": True, "spearman": True, "kl": False, "ece_true": False,
}  # fmt: skip
#: What is told beside them, which is better neither way.
BESIDE = ("ece_15_by_chance", "coverage_90")


@dataclass(frozen=True)
class Group:
    """The lines of one method on one task with one base, which differ in their seeds.

    Attributes:
        task: its name in the study, as those that follow.
        base: network.
        protocol: see `Target`.
        method: of inference.
        lines: those with a result.
    """

    task: str
    base: str
    protocol: str
    method: str
    lines: tuple[Target, ...] = field(compare=False)

    @property
    def labels(self) -> dict[str, str]:
        """What names it in a table."""
        return {"task": self.task, "base": self.base, "protocol": self.protocol, "method": self.method}

    def stands_beside(self, other: Group, method: str) -> bool:
        """Whether it is of this method where the other one is."""
        return (self.task, self.base, self.protocol, self.method) == (other.task, other.base, other.protocol, method)


def groups_of(targets: Sequence[Target], results: Results) -> list[Group]:
    """Groups of the lines that have results, a task's protocols and methods after one another."""
    found: dict[tuple[str, str, str, str], list[Target]] = {}
    for target in targets:
        if target.protocol != "grid":
            found.setdefault((target.task, target.base, target.protocol, target.method), [])
            if results.settled(target) == "done":
                found[target.task, target.base, target.protocol, target.method].append(target)
    groups = [Group(*key, tuple(lines)) for key, lines in found.items() if lines]
    order = list(dict.fromkeys((group.task, group.base) for group in groups))
    return sorted(groups, key=lambda group: order.index((group.task, group.base)))


def summary_of(targets: Sequence[Target], results: Results, reference: str) -> pd.DataFrame:
    """A row for each metric of each group.

    Columns: ``task``, ``base``, ``protocol``, ``method``, ``metric``, ``seeds`` (their number), and ``value``, the mean
    over seeds. Its 95 % intervals are ``rows_low`` to ``rows_high``, what other rows would change (a bootstrap), and
    ``seeds_low`` to ``seeds_high``, what other seeds would (Student's t). ``difference`` from the reference, over the
    seeds that both have, has the same intervals, of pairs by row and by seed; ``chance`` says that one of them holds
    zero.
    """
    import pandas as pd

    groups = groups_of(targets, results)
    scores = {group: _scores(group, results) for group in groups}
    rows = []
    for group, own in scores.items():
        other = next((each for each in groups if each.stands_beside(group, reference)), group)
        differences = {} if other is group else _differences(own, scores[other])
        for metric, ends in _averages(own).items():
            rows.append(group.labels | {"metric": metric, "seeds": len(own)} | ends | differences.get(metric, {}))
    return pd.DataFrame(rows)


def over_seeds(values: Sequence[float], least: float = -math.inf, greatest: float = math.inf) -> Interval:
    """Mean, and where it would be with other seeds: the 95 % interval of Student's t; none of a single one.

    It is cut at the least and the greatest value that there are.
    """
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean)
    reach = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, max(mean - reach, least), min(mean + reach, greatest))


@dataclass(frozen=True)
class _Scores:
    """Statistics of the predictions of one seed."""

    table: Mapping[str, Bounded]
    rows: int

    def value(self, metric: str) -> float:
        return resampling.once(self.table[metric][0], self.rows)


def _scores(group: Group, results: Results) -> dict[int, _Scores]:
    found = {}
    for target in group.lines:
        prediction = results.predicted(target)
        statistics = prediction.statistics()
        table = {name: statistics[name] for name in (*BETTER, *BESIDE) if name in statistics}
        found[target.seed] = _Scores(table, len(prediction))
    return found


def _averages(own: Mapping[int, _Scores]) -> dict[str, dict[str, float]]:
    """Means over seeds with both intervals, by metric that all seeds have: not all predictions know the truth."""
    first = next(iter(own.values()))
    names = [name for name in first.table if all(name in each.table for each in own.values())]
    over_rows = _over_rows({name: _mean(own.values(), name) for name in names}, own.values())
    found = {}
    for name in names:
        seeds = over_seeds([each.value(name) for each in own.values()], *first.table[name][1:])
        found[name] = {"value": seeds.value, **_ends("rows", over_rows.get(name)), **_ends("seeds", seeds)}
    return found


def _differences(own: Mapping[int, _Scores], other: Mapping[int, _Scores]) -> dict[str, dict[str, object]]:
    """Differences of the means over the seeds that both have, with both intervals, by metric."""
    both = {seed: (own[seed], other[seed]) for seed in own if seed in other}
    names = [name for name in BETTER if both and all(name in each.table for pair in both.values() for each in pair)]
    first, second = ({seed: pair[place] for seed, pair in both.items()} for place in (0, 1))
    table = {name: _less(_mean(first.values(), name), _mean(second.values(), name)) for name in names}
    over_rows = _over_rows(table, [*first.values(), *second.values()])
    found: dict[str, dict[str, object]] = {}
    for name in names:
        seeds = over_seeds([one.value(name) - two.value(name) for one, two in both.values()])
        intervals = [each for each in (over_rows.get(name), seeds) if each is not None and not math.isnan(each.low)]
        found[name] = {
            "difference": seeds.value,
            **_ends("difference_rows", over_rows.get(name)),
            **_ends("difference_seeds", seeds),
            "chance": any(each.low <= 0 <= each.high for each in intervals) if intervals else True,
        }
    return found


def _mean(scores: Iterable[_Scores], name: str) -> Bounded:
    """A metric averaged over seeds, each with the same rows counted as often."""
    tables = [each.table[name] for each in scores]
    _, least, greatest = tables[0]
    return resampling.average([statistic for statistic, _, _ in tables]), least, greatest


def _less(one: Bounded, other: Bounded) -> Bounded:
    return lambda counts: one[0](counts) - other[0](counts), -math.inf, math.inf


def _over_rows(table: Mapping[str, Bounded], scores: Iterable[_Scores]) -> dict[str, Interval]:
    """Intervals over rows, which all predictions have as many of: row by row they are resampled together."""
    sizes = {each.rows for each in scores}
    return bootstrap(table, sizes.pop(), 0, True) if len(sizes) == 1 and table else {}


def _ends(name: str, interval: Interval | None) -> dict[str, float]:
    low, high = (math.nan, math.nan) if interval is None else (interval.low, interval.high)
    return {f"{name}_low": low, f"{name}_high": high}
