"""How long a study will take, from a few steps of each method on a few batches of rows."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from bayeslora import inference
from bayeslora.app import runs
from bayeslora.app.config import OF_ROWS
from bayeslora.app.studies.cells import Cell, Evaluation
from bayeslora.app.studies.expansion import Target
from bayeslora.app.studies.results import Results
from bayeslora.errors import BayesLoraError
from bayeslora.inference.mixture import mixture_of
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.tasks import Task

__all__ = ["Estimate", "estimate"]

#: Rows of a batch, of a backend that does not say.
BATCH = 32
#: Draws of the shortest chain, where fewer are predicted by; Pyro's report on one needs four.
FEWEST = 4
#: Seconds by which a longer piece of work must differ from a shorter one for their difference to be more than noise.
ENOUGH = 0.2
#: What says nothing of the network and the program over it.
OF_FIT = {"backend", "preset", "settings", "chains", "output"}


@dataclass(frozen=True)
class Estimate:
    """What the cells of one method on one task and base will take.

    Attributes:
        task: its name in the study, as those that follow.
        base: network.
        method: of inference.
        cells: fits that are not done yet; at most, where settings are chosen.
        fit_seconds: of one of them, without what it starts from or is over.
        predict_seconds: of the rows of its split.
        error: why that is not known.
    """

    task: str
    base: str
    method: str
    cells: int
    fit_seconds: float = 0.0
    predict_seconds: float = 0.0
    error: str = ""


def estimate(targets: Sequence[Target], results: Results) -> Iterator[Estimate]:
    """Estimates of each task, base and method, from the first of its cells, as they come. Nothing is written."""
    first: dict[tuple[str, str, str], tuple[Cell, Evaluation]] = {}
    cells: dict[tuple[str, str, str], dict[str, Cell]] = {}
    for target in targets:
        key = target.task, target.base, target.method
        for candidate in target.candidates:
            first.setdefault(key, (candidate.entry.cell, candidate.entry.evaluations[""]))
            cells.setdefault(key, {})[candidate.entry.cell.name] = candidate.entry.cell
    for _, keys in groupby(first, lambda key: key[:2]):
        draws = max(evaluation.draws for _, evaluation in first.values())
        trials = _Trials(max(draws, FEWEST))  # of one task and base, whose networks are in memory meanwhile
        for key in keys:
            left = sum(results.fitted(each) is None for each in cells[key].values())
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of so short a fit they say nothing
                    cell, evaluation = first[key]
                    found = Estimate(*key, left, trials.fit(cell).seconds, trials.predict(cell, evaluation))
            except (BayesLoraError, MemoryError, RuntimeError) as error:
                found = Estimate(*key, left, error=f"{type(error).__name__}: {error}" if left else "")
            yield found


class _Fit(NamedTuple):
    """Seconds of a whole fit, without and with what it is over, and what a short one gives."""

    seconds: float
    whole: float
    posterior: Posterior


@dataclass
class _Trials:
    """Short fits and predictions; those that have what they need in common share it.

    Attributes:
        draws: of the shortest chain.
        tasks: that were read.
        programs: that were made, and seconds of that.
        fits: by the names of their cells.
    """

    draws: int
    tasks: dict[str, Task] = field(default_factory=dict)
    programs: dict[str, tuple[float, Program]] = field(default_factory=dict)
    fits: dict[str, _Fit] = field(default_factory=dict)

    def fit(self, cell: Cell) -> _Fit:
        """Seconds of a fit.

        With B batches of rows and E epochs a fit takes a + s E B + p B seconds: s of a step, p of a batch of what is
        done once, such as a curvature. Fits on one batch and on b, and one of a single step on b, say all three. A
        backend that takes several epochs at the least, as one that keeps snapshots does, has no p. A chain takes a
        time that is linear in its length, on all rows; one of `nuts` as its trees are at first. Independent fits are
        as many times one of them.
        """
        if cell.name not in self.fits:
            over = self.fit(cell.start).whole if cell.start is not None and cell.is_within else 0.0
            backend, times = _single(cell.config.settings)
            loading, _ = self.program(cell)
            trial = self._chain if _is_chain(backend) else self._training
            seconds, posterior = trial(cell, backend)
            times *= cell.config.chains
            if times > 1:
                posterior = mixture_of([*posterior.chains] * times)
            whole = seconds * times
            self.fits[cell.name] = _Fit(loading + max(whole - over, 0.0), whole, posterior)
        return self.fits[cell.name]

    def predict(self, cell: Cell, evaluation: Evaluation) -> float:
        """Seconds of a prediction, which are as the rows are."""
        posterior, rows = self.fit(cell).posterior, self.task(cell).split(evaluation.split)
        n, batch = min(len(rows), evaluation.rows or len(rows)), _batch(cell.config.settings)
        how: dict[str, Any] = {"seed": cell.config.seed, "progress": False}

        def predicted(size: int) -> float:
            part = rows.select(range(min(size * batch, n)))
            return _seconds(lambda: posterior.predict(part, evaluation.draws, evaluation.method, **how))[0]

        size, seconds = _grown(predicted, n / batch)
        return seconds * max(n / (size * batch), 1.0)

    def _training(self, cell: Cell, settings: Mapping[str, Any]) -> tuple[float, Posterior]:
        all_epochs: Any = _innermost(settings).get("epochs")
        epochs, posterior = self._fewest(cell, settings, all_epochs)

        def fitted(size: int, epochs: float | None = epochs) -> float:
            return self._seconds(cell, _with(settings, epochs=epochs), size)[0]

        batches = math.ceil(len(self.task(cell).train) / _batch(settings))
        one = fitted(1)
        size, more = _grown(fitted, batches, one, 2)
        a_batch = (more - one) / (size - 1) if size > 1 else 0.0
        if epochs is None:
            return one + a_batch * (batches - 1), posterior
        of_steps = more - (fitted(size, 1 / size) if epochs == 1 else one)
        if size > 1 and of_steps >= ENOUGH / 2 and cell.begin is None:
            step = of_steps / ((size - 1) * epochs)
        else:  # perhaps noise, which many steps would multiply: what is laid around a start may make none
            times, longer = _grown(lambda times: fitted(size, times * epochs), all_epochs / epochs, more, 4)
            step = (longer - more) / ((times - 1) * epochs * size) if times > 1 else 0.0
        step = max(step, 0.0)
        once = max(a_batch - epochs * step, 0.0)
        return one + step * (all_epochs * batches - epochs) + once * (batches - 1), posterior

    def _fewest(self, cell: Cell, settings: Mapping[str, Any], epochs: float | None) -> tuple[float | None, Posterior]:
        """The fewest epochs that a backend takes, 1, 2, 4, ...; what its first fit imports is not in its time."""
        tried = 1.0
        while epochs is not None and tried < epochs:
            try:
                return tried, self._seconds(cell, _with(settings, epochs=tried), 1)[1]
            except BayesLoraError:
                tried *= 2
        return epochs, self._seconds(cell, settings, 1)[1]

    def _chain(self, cell: Cell, settings: Mapping[str, Any]) -> tuple[float, Posterior]:
        inner = _innermost(settings)
        full = max(inner["draws"] / self.draws, 1.0)
        posteriors = []

        def sampled(size: int) -> float:
            draws = min(size * self.draws, inner["draws"])
            warmup = round(inner["warmup"] * draws / inner["draws"])
            seconds, posterior = self._seconds(cell, _with(settings, draws=draws, warmup=warmup))
            posteriors.append(posterior)
            return seconds

        one = sampled(1)
        size, more = _grown(sampled, full, one, 2)
        a_part = max((more - one) / (size - 1), 0.0) if size > 1 else 0.0
        return one + a_part * (full - 1), posteriors[-1]

    def _seconds(self, cell: Cell, settings: Mapping[str, Any], size: int | None = None) -> tuple[float, Posterior]:
        """Seconds of a fit on so many batches of rows, with its part of the held-out ones, and what it gives."""
        task, config = self.task(cell), cell.config
        before = None if cell.begin is None else self.fit(cell.begin).posterior
        _, program = self.program(cell)
        rows, heldout = task.train, task.heldout
        if size is not None:
            rows = rows.select(range(min(size * _batch(settings), len(rows))))
            part = len(rows) / len(task.train)
            settings = _set_aside(settings, part)
            if heldout is not None:
                heldout = heldout.select(range(math.ceil(len(heldout) * part)))
        how: dict[str, Any] = {"seed": config.seed, "progress": False, "heldout": heldout, "start": before}
        assert config.backend is not None
        backend = config.backend
        return _seconds(lambda: inference.fit(program, rows, backend, **how, **settings))

    def task(self, cell: Cell) -> Task:
        """What a fit is of."""
        key = repr([getattr(cell.config, name) for name in (*OF_ROWS, "seed")])
        if key not in self.tasks:
            self.tasks[key] = runs.task_of(cell.config)
        return self.tasks[key]

    def program(self, cell: Cell) -> tuple[float, Program]:
        """Seconds in which a network is loaded, and the program over it."""
        key = repr({name: value for name, value in cell.config.to_dict().items() if name not in OF_FIT})
        if key not in self.programs:
            task = self.task(cell)
            self.programs[key] = _seconds(lambda: runs.build_program(cell.config, task))
        return self.programs[key]


def _grown(work: Callable[[int], float], full: float, less: float = 0.0, size: int = 1) -> tuple[int, float]:
    """A size, and its seconds: twice as large again and again, until they are enough more, or it is all there is."""
    while True:
        size = min(size, math.ceil(full))
        seconds = work(size)
        if seconds - less >= ENOUGH or size >= full:
            return size, seconds
        size *= 2


def _innermost(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of the backend that does the work, of one over another one."""
    return _innermost(settings["of_settings"]) if "of_settings" in settings else settings


def _with(settings: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings with others of the backend that does the work, where it has them."""
    if "of_settings" in settings:
        return {**settings, "of_settings": _with(settings["of_settings"], **changes)}
    return {**settings, **{name: value for name, value in changes.items() if name in settings}}


def _set_aside(settings: Mapping[str, Any], part: float) -> dict[str, Any]:
    """Settings by which a part of the rows has that part of the held-out ones."""
    found = dict(settings)
    if "of_settings" in settings:
        found["of_settings"] = _set_aside(settings["of_settings"], part)
    if settings.get("heldout_size"):
        found["heldout_size"] = math.ceil(settings["heldout_size"] * part)
    return found


def _single(settings: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Settings with one member in place of several that are fitted one after the other, and how many those are."""
    found, times = dict(settings), 1
    if "of_settings" in settings:
        found["of_settings"], times = _single(settings["of_settings"])
        if "members" in settings and not settings.get("stacked"):
            times *= settings["members"]
            found["members"] = 1
    return found, times


def _is_chain(settings: Mapping[str, Any]) -> bool:
    inner = _innermost(settings)
    return "epochs" not in inner and {"draws", "warmup"} <= inner.keys()


def _batch(settings: Mapping[str, Any]) -> int:
    """Rows of a step."""
    inner = _innermost(settings)
    return int(inner.get("batch_size", BATCH)) * int(inner.get("gradient_accumulation_steps", 1))


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.monotonic()
    found = work()
    return time.monotonic() - begun, found
