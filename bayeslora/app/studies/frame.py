"""Results of a study as a table of pandas: a row for each line, whatever has come of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bayeslora.app.studies.cells import Cell
from bayeslora.app.studies.expansion import Target
from bayeslora.app.studies.results import Results
from bayeslora.predict.metrics import Metrics

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LABELS", "cost_of", "failure_of", "frame_of", "number"]

#: Columns that say which line it is.
LABELS = ("task", "base", "method", "seed", "protocol")


def frame_of(targets: Sequence[Target], results: Results) -> pd.DataFrame:
    """A row for each line.

    Columns are `LABELS`; the points of the grid; ``state`` and ``error``; each metric, and its interval over rows as
    ``METRIC_low`` and ``METRIC_high``; costs, see `cost_of`; settings that were chosen, as ``chosen_NAME``;
    ``cell``, the name of the folder; ``device``, what the fit ran on; and ``warnings`` of the fit, of those that it
    starts from and of the rows that were predicted, a line each.
    """
    import pandas as pd

    return pd.DataFrame([dict(_row(target, results)) for target in targets])


def _row(target: Target, results: Results) -> Iterator[tuple[str, Any]]:
    yield from ((name, getattr(target, name)) for name in LABELS)
    yield from ((name, number(value)) for name, value in target.point.items())
    yield "state", results.settled(target)
    yield "error", failure_of(target, results)
    chosen = results.chosen(target)
    if chosen is None:
        return
    yield from ((f"chosen_{name}", number(value)) for name, value in chosen.point.items())
    yield "cell", chosen.entry.cell.name
    yield "device", (results.fitted(chosen.entry.cell) or {}).get("device", "")
    found = results.evaluated(chosen.entry.cell, chosen.entry.evaluations[""])
    warned = [*(results.fitted(each) for each in chosen.entry.cell.chain), found]
    said = [text for each in warned for text in (each or {}).get("warnings", [])]
    yield "warnings", "\n".join(dict.fromkeys(" ".join(text.split()) for text in said))
    if found is not None:
        for name, interval in Metrics.from_dict(found["metrics"]).items():
            yield from ((name, interval.value), (f"{name}_low", interval.low), (f"{name}_high", interval.high))
    yield from cost_of(target, results).items()


def failure_of(target: Target, results: Results) -> str:
    """What went wrong with a line, or with the first of its trials of which none can be chosen; empty if nothing."""
    chosen = results.chosen(target)
    entries = target.trials if chosen is None else (chosen.entry,)
    errors = (results.error(each) for each in entries if results.missing(each))
    error = next((found for found in errors if found is not None), None)
    if error is None and chosen is None and results.settled(target) == "failed":
        return "No trial has a finite NLL, by which one could be chosen."
    return "" if error is None else f"{error['type']}: {error['message']}".removeprefix(": ")


def cost_of(target: Target, results: Results) -> dict[str, float]:
    """What a line cost, as if it were the only one of the study; empty if it has no result.

    ``fit_seconds`` of the fit and those that it starts from; ``predict_seconds`` of its rows; ``seconds`` of both;
    ``tuning_seconds`` of all trials by which its settings were chosen, those that failed as well;
    ``peak_memory_bytes``, the largest of the fits; ``parameters`` and ``extra_parameters`` of the last.
    """
    chosen = results.chosen(target)
    if chosen is None or results.settled(target) != "done":
        return {}
    cell = chosen.entry.cell
    costs = [found["cost"] for each in _counted(cell) if (found := results.fitted(each)) is not None]
    evaluated = results.evaluated(cell, chosen.entry.evaluations[""])
    assert evaluated is not None
    fitted = sum(cost.get("seconds", 0.0) for cost in costs)
    found = {
        "fit_seconds": fitted,
        "predict_seconds": evaluated["seconds"],
        "seconds": fitted + evaluated["seconds"],
        "tuning_seconds": _tuning_seconds(target, results),
        "peak_memory_bytes": max(cost.get("peak_memory_bytes", 0.0) for cost in costs),
    }
    return found | {name: costs[-1][name] for name in ("parameters", "extra_parameters") if name in costs[-1]}


def _counted(cell: Cell) -> list[Cell]:
    """Fits whose costs are to be added up: one that is over another one counts that itself."""
    within = {each.start.name for each in cell.chain if each.is_within and each.start is not None}
    return [each for each in cell.chain if each.name not in within]


def _tuning_seconds(target: Target, results: Results) -> float:
    cells: dict[str, Cell] = {cell.name: cell for trial in target.trials for cell in _counted(trial.cell)}
    fits = [results.fitted(cell) for cell in cells.values()]
    trials = {trial.cell.name: trial for trial in target.trials}  # equal ones were done once
    predicted = [results.evaluated(trial.cell, trial.evaluations[""]) for trial in trials.values()]
    failed = [results.error(trial) for trial in trials.values() if results.state(trial) == "failed"]
    fitted = sum(each["cost"].get("seconds", 0.0) for each in fits if each)
    return fitted + sum(each.get("seconds", 0.0) for each in (*predicted, *failed) if each)


def number(value: Any) -> Any:
    """A value as a number, where it is one, since YAML takes 1e-3 for text; a list as text."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
