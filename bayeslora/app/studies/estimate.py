"""How long a study will take, from fits on one and on two batches of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bayeslora import inference
from bayeslora.app import runs
from bayeslora.app.studies.cells import Cell, Evaluation
from bayeslora.errors import BayesLoraError
from bayeslora.posterior import Posterior

if TYPE_CHECKING:
    from bayeslora.app.studies.study import Study

__all__ = ["Estimate", "estimate"]

#: Rows of a batch, of a backend that does not say.
BATCH = 32


@dataclass(frozen=True)
class Estimate:
    """What the cells of one method on one task and base will take.

    Attributes:
        task: its name in the study, as those that follow.
        base: network.
        method: of inference.
        cells: fits that are not done yet; at most, where settings are chosen.
        fit_seconds: of one of them, without what it starts from.
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


def estimate(study: Study) -> Iterator[Estimate]:
    """Estimates of each task, base and method, from the first of its cells.

    A fit takes a time that is linear in the number of its rows: fits on one and on two batches, with all their epochs,
    say which. Nothing is written.
    """
    first: dict[tuple[str, str, str], tuple[Cell, Evaluation]] = {}
    cells: dict[tuple[str, str, str], dict[str, Cell]] = {}
    for target in study.targets:
        key = target.task, target.base, target.method
        for candidate in target.candidates:
            first.setdefault(key, (candidate.entry.cell, candidate.entry.evaluations[""]))
            cells.setdefault(key, {})[candidate.entry.cell.name] = candidate.entry.cell
    warm = False
    for key, (cell, evaluation) in first.items():
        left = sum(study.results.fitted(each) is None for each in cells[key].values())
        try:
            if not warm:
                _timed(cell, 1)  # which imports what the others find
                warm = True
            yield Estimate(*key, left, *_extrapolated(cell, evaluation))
        except (BayesLoraError, MemoryError, RuntimeError) as error:
            yield Estimate(*key, left, error=f"{type(error).__name__}: {error}")


def _extrapolated(cell: Cell, evaluation: Evaluation) -> tuple[float, float]:
    """Seconds of the fit and of its prediction, on all rows."""
    task = runs.task_of(cell.config)
    batch = _batch(cell)
    (one, posterior), (two, _) = (_timed(cell, batches) for batches in (1, 2))
    rows = task.split(evaluation.split)

    def predicted(n: int) -> float:
        part = rows.select(range(min(n, len(rows))))
        how: dict[str, Any] = {"seed": cell.config.seed, "progress": False}
        return _seconds(lambda: posterior.predict(part, evaluation.draws, evaluation.method, **how))[0]

    fit = _linear(one, two, len(task.train) / batch)
    return fit, _linear(predicted(batch), predicted(2 * batch), len(rows) / batch)


def _linear(one: float, two: float, batches: float) -> float:
    """Seconds of so many batches, from those of one and of two."""
    return one + max(two - one, 0.0) * max(batches - 1, 0.0)


def _timed(cell: Cell, batches: int) -> tuple[float, Posterior]:
    """Seconds of a fit on some batches of its rows, without what it starts from, and what it gives."""
    before = None if cell.begin is None else _timed(cell.begin, 1)[1]
    task = runs.task_of(cell.config)
    program = runs.build_program(cell.config, task)
    rows = task.train.select(range(min(batches * _batch(cell), len(task.train))))
    assert cell.config.backend is not None
    backend, config = cell.config.backend, cell.config
    how: dict[str, Any] = {"seed": config.seed, "progress": False, "heldout": task.heldout, "start": before}
    return _seconds(lambda: inference.fit(program, rows, backend, chains=config.chains, **how, **config.settings))


def _batch(cell: Cell) -> int:
    settings: Any = cell.config.settings
    while "of_settings" in settings:
        settings = settings["of_settings"]
    return int(settings.get("batch_size", BATCH))


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.monotonic()
    found = work()
    return time.monotonic() - begun, found
