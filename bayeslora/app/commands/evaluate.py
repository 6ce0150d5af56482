"""Measure a posterior on labelled rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayeslora.app.options import Assignments, BatchSize, Draws, Method, MovedBase, MovedData, Run, Split, new_file
from bayeslora.app.terminal import metrics_table, say, show
from bayeslora.errors import SettingError

if TYPE_CHECKING:
    from bayeslora.predict.prediction import Prediction
    from bayeslora.predict.reliability import Guesses

__all__ = ["evaluate", "of_another_task"]


def evaluate(
    run: Run,
    task: Annotated[
        str | None, typer.Option(help="Another task with the same classes.", show_default="the run's own")
    ] = None,
    data_dir: MovedData = None,
    split: Split = "validation",
    draws: Draws = 10,
    method: Method = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws and of the intervals.", min=0, max=2**32 - 1)] = 0,
    batch_size: BatchSize = 64,
    base: MovedBase = None,
    assignments: Assignments = None,
    json: Annotated[
        Path | None,
        typer.Option(parser=new_file, metavar="FILE", help="Write the metrics into a JSON file.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=new_file, metavar="FILE", help="Draw a reliability diagram (png, pdf, svg).", show_default=False
        ),
    ] = None,
) -> None:
    """Predict the rows of a split and measure accuracy and calibration, each with a 95 % interval.

    Of completions the calibration is that of their tokens, and so is the reliability diagram.
    """
    from bayeslora import files
    from bayeslora.app import runs
    from bayeslora.app.seen import flattered
    from bayeslora.diagnostics.tokens import METHODS, token_calibration
    from bayeslora.observations import Completions
    from bayeslora.passes import Rows
    from bayeslora.predict.plots import figure_format, reliability_diagram, save_figure
    from bayeslora.predict.truth import with_truth

    settings = of_another_task("evaluate", assignments, task)
    if plot is not None:
        figure_format(plot)  # before the work
    posterior = runs.opened(run, base)
    reported = runs.saved_task(posterior, task, data_dir, settings)
    say(*reported.notes)
    rows = reported.split(split)
    read = Rows.of(posterior.program, rows)
    say(*flattered(posterior, read, split))
    prediction = with_truth(posterior.predict(read, draws, method, seed, batch_size), rows)
    found, finished = prediction.metrics(seed=seed), posterior.record.finished
    guesses: Prediction | Guesses = prediction
    if isinstance(posterior.program.observation, Completions) and prediction.method in METHODS:
        guesses = tokens = token_calibration(posterior, rows, draws, method, seed=seed, batch_size=batch_size)
        found = replace(found, intervals={**found, **tokens.measured(seed=seed)})
    title = f"{posterior.record.backend} on {rows.spec.name}, {split}" + ("" if finished else " (not finished)")
    show(metrics_table(found, title))  # first: what it took so long to find is not lost with a file
    if json is not None:
        files.write_json(json, found.to_dict() | {"finished": finished})
    if plot is not None:
        save_figure(reliability_diagram(guesses, title=title), plot)


def of_another_task(command: str, assignments: list[str] | None, task: str | None) -> dict[str, Any]:
    """Settings of a task that is not the run's own."""
    from bayeslora.app.config import assign
    from bayeslora.app.resolving import task_settings

    if not assignments:
        return {}
    settings = assign({}, assignments)
    if set(settings) != {"task_settings"} or task is None:
        raise SettingError(
            f"{command} takes --set for settings of another task (--task) alone, such as task.label=answer."
        )
    return task_settings(settings["task_settings"])
