"""How far a study has come, and how long it will take."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from bayeslora.app.studies.expansion import Target
from bayeslora.app.studies.frame import cost_of, failure_of
from bayeslora.app.studies.results import Results
from bayeslora.app.terminal import say

__all__ = ["Progress", "duration"]


class Progress:
    """Says each line that has come to its end, with the time that the others will take.

    A line that is left takes as long as those of its method on its task and base did, or as all did on average.

    Args:
        targets: all lines.
        results: where they are.
        workers: how many are worked on at a time.
        show: say it.
    """

    def __init__(self, targets: Sequence[Target], results: Results, workers: int = 1, show: bool = True) -> None:
        self.left = list(targets)
        self.total = len(self.left)
        self.results = results
        self.workers = workers
        self.show = show
        self.seconds: dict[tuple[str, str, str], list[float]] = {}

    def __call__(self, target: Target) -> None:
        """Take note of a line that is done or has failed."""
        self.left.remove(target)
        seconds = cost_of(target, self.results).get("seconds")
        if seconds is not None:
            self.seconds.setdefault((target.task, target.base, target.method), []).append(seconds)
        if self.show:
            failure = failure_of(target, self.results)
            took = f"failed: {failure}" if failure or seconds is None else duration(seconds)
            say(f"[{self.total - len(self.left)}/{self.total}] {target.title}: {took}{self._rest()}")

    def _rest(self) -> str:
        if not self.left or not self.seconds:
            return ""
        usual = fmean(each for known in self.seconds.values() for each in known)
        known = (self.seconds.get((target.task, target.base, target.method)) for target in self.left)
        return f"; about {duration(sum(usual if each is None else fmean(each) for each in known) / self.workers)} left"


def duration(seconds: float) -> str:
    """A time in words, such as "3 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
