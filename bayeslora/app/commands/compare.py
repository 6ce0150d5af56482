"""Fit several methods and compare them: backends on one task by flags, or a study by its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayeslora.app.options import (
    Assignments,
    Base,
    ConfigFile,
    DataDir,
    Draws,
    HeldoutSize,
    Method,
    Model,
    Split,
    TaskName,
    TrainSize,
    new_folder,
)
from bayeslora.app.terminal import new_table, say, show
from bayeslora.errors import SettingError, unknown

if TYPE_CHECKING:
    from bayeslora.app.config import RunConfig
    from bayeslora.app.studies import Study
    from bayeslora.app.studies.report import Report

__all__ = ["compare"]

#: Flags that say how a study is run, not what it is.
OF_RUNNING = {"study", "output", "workers", "launcher", "options", "shard", "retry", "dry_run"}
#: Fields of a run that have flags of their own in a comparison, whatever a configuration says of the last four.
OWN_FLAGS = {
    "base": "--base", "task": "--task", "backend": "--backends", "preset": "--backends", "seed": "--seeds",
    "output": "--output",
}  # fmt: skip


def compare(
    context: typer.Context,
    study: Annotated[
        Path | None,
        typer.Argument(help="YAML file of a study; then only flags of how it is run are allowed.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=new_folder, metavar="FOLDER", help="Folder of the study.", show_default="runs/NAME of its file"
        ),
    ] = None,
    backends: Annotated[
        str | None, typer.Option(help="Inference algorithms or presets, separated by commas.", show_default=False)
    ] = None,
    base: Base = None,
    task: TaskName = None,
    data_dir: DataDir = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    model: Model = None,
    train_size: TrainSize = None,
    heldout_size: HeldoutSize = None,
    split: Split = "validation",
    draws: Draws = 10,
    method: Method = None,
    assignments: Assignments = None,
    config: ConfigFile = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that share the fits.", min=1, show_default="this one")
    ] = None,
    launcher: Annotated[str, typer.Option(help="What starts them: local, submitit (Slurm), ray.")] = "local",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="KEY=VALUE",
            help="Option of the launcher (timeout_min=600); repeatable.",
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="One of N parts of the lines, from 1 on.", show_default="all"),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the fits and what they will take, and end: with status 1 if one would fail."
        ),
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed before.")] = False,
) -> None:
    """Fit several methods with several seeds and put them into one table.

    A file names tasks, bases, methods, seeds and settings of a study, whose fits are done one by one and kept.
    Without one, flags name backends, which become the methods of a study of one task and base.

    Settings go to every backend that has them; one with the backend's name before it, such as svi.particles=4, to that
    one alone. The same command again goes on with a study that was stopped. Where a fit failed, the others go on, and
    the command ends with status 1.
    """
    from bayeslora.app.config import read_config
    from bayeslora.app.studies import Study

    context.obj["resume"] = lambda: "The same command goes on from there."
    if study is not None:
        _check_flags(context)
        found = Study(study, output)
    elif output is None or backends is None:
        raise SettingError("compare takes the file of a study, or --backends and --output.")
    else:
        flags = {
            "base": base, "task": task, "data_dir": data_dir, "model": model, "train_size": train_size,
            "heldout_size": heldout_size,
        }  # fmt: skip
        names = _words(backends)
        shared, own = _by_backend(assignments or [], names)
        numbers = [_seed(word) for word in _words(seeds)]
        of_flags = _of_flags(read_config(config, flags, shared), own, numbers, split, draws, method)
        found = Study(of_flags, output)
    if dry_run:
        _show_plan(found, _shard(shard), workers or 1)
        return
    plugins = context.find_root().params.get("plugin") or ()
    found.run(
        workers=workers,
        launcher=launcher,
        options=_options(options or []),
        shard=_shard(shard),
        plugins=plugins,
        retry=retry,
    )
    _show_report(found.reported)


def _of_flags(
    config: RunConfig,
    methods: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    split: str,
    draws: int,
    method: str | None,
) -> dict[str, Any]:
    """The study that flags stand for: backends or presets, with assignments of their own, on one task and base."""
    from bayeslora.app.config import assign
    from bayeslora.app.resolving import named

    task = Path(config.task).stem if Path(config.task).suffix else config.task
    return {
        "tasks": {task: {"task": config.task}},
        "bases": {Path(config.base).name or config.base: {"base": config.base}},
        "methods": {name: named(name) | assign({}, own) | {"predict": method} for name, own in methods.items()},
        "seeds": seeds,
        "common": {name: value for name, value in config.to_dict().items() if name not in OWN_FLAGS},
        "evaluation": {"split": split, "draws": draws},
    }


def _check_flags(context: typer.Context) -> None:
    """Make sure that no flag was given which the file of a study stands for."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in OF_RUNNING and source is not None and source.name == "COMMANDLINE":
            flag = "set" if name == "assignments" else name.replace("_", "-")
            raise SettingError(f"--{flag} is said by the file of a study: write it there.")


def _show_report(report: Report) -> None:
    """Tables, where the rest is, and, by the exit status, whether anything failed."""
    for table in report.tables():
        turned = table.turned() if len(table.header) > len(table.rows) + 1 else table
        shown = new_table(turned.title, list(turned.header))
        for row in turned.rows:
            shown.add_row(*row)
        shown.caption, shown.caption_justify = table.note, "left"
        show(shown)
    folder = report.study.results.folder
    show(f"Written into {folder / 'report'}: study.md, tables as CSV, JSON and LaTeX, and pictures.")
    show(f"Each fit is a run in {folder / 'cells'}.")
    failures = report.failures
    if len(failures):
        only = int((failures["state"] == "done").sum())
        where = f" ({only} on a shift alone)" if only else ""
        say(f"{len(failures)} of {len(report.frame)} lines failed{where}, see study.md; --retry tries them again.")
        raise typer.Exit(1)


def _show_plan(study: Study, shard: tuple[int, int] | None, workers: int) -> None:
    """The cells of a part of a study, and an estimate of their time, a line for each method as it comes.

    By the exit status, too, whether one would fail.
    """
    from bayeslora.app.studies.estimate import estimate
    from bayeslora.app.studies.progress import duration
    from bayeslora.app.studies.running import check_rows
    from bayeslora.app.studies.study import cells_of

    targets = study.part(shard)
    check_rows(targets, study.results)
    for cell in cells_of(targets):
        start = "" if cell.start is None else f", from {cell.start.name}"
        show(f"{cell.name}{start}{', done' if study.results.fitted(cell) else ''}")
    lines = len({(target.task, target.base, target.method) for target in targets})
    show("What is left, by a few steps of each:")
    total, failing = 0.0, set()
    first: dict[str, str] = {}  # line that an error was first told of
    for number, each in enumerate(estimate(targets, study.results), 1):
        line = f"[{number}/{lines}]"
        said = f"{duration(each.fit_seconds)} a fit, {duration(each.predict_seconds)} a prediction"
        if each.error:
            said = f"fails as {first[each.error]} does" if each.error in first else each.error
            first.setdefault(each.error, line)
            failing.add((each.task, each.base, each.method))
        show(f"{line} {each.task}, {each.base}, {each.method}: {each.cells} left, {said}")
        total += each.cells * (each.fit_seconds + each.predict_seconds)
    cells = cells_of([each for each in targets if (each.task, each.base, each.method) not in failing])
    show(f"{len(cells)} cells at most, about {duration(total / workers)} for {workers} at a time.")
    if failing:
        say(f"{len(failing)} of {lines} lines would fail, as said above; they are not in this estimate.")
        raise typer.Exit(1)


def _options(assignments: list[str]) -> dict[str, str]:
    parted = [assignment.partition("=") for assignment in assignments]
    for key, equals, value in parted:
        if not (key and equals):
            raise SettingError(f"Cannot read the option '{key}{equals}{value}': expected key=value.")
    return {key: value for key, _, value in parted}


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, slash, parts = text.partition("/")
    if not (number.isdigit() and slash and parts.isdigit()):
        raise SettingError(f"--shard is a part such as 1/4, found '{text}'.")
    return int(number), int(parts)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seed(word: str) -> int:
    if not word.isdigit():
        raise SettingError(f"A seed is a whole number that is not negative, found '{word}'.")
    return int(word)


def _by_backend(assignments: list[str], names: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Assignments for all, and those for the backend whose name stands before them."""
    from bayeslora.app.config import PREFIXES
    from bayeslora.inference import BACKENDS

    if len(set(names)) < len(names):
        raise SettingError(f"A backend is given twice: {', '.join(names)}.")
    shared: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in names}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        prefix, dot, name = key.partition(".")
        said = name if prefix in own and dot else key
        if said.strip() in OWN_FLAGS:
            raise SettingError(f"'{assignment}' is said by a flag of its own: give {OWN_FLAGS[said.strip()]}.")
        if prefix in own and dot:
            own[prefix].append(f"{name}{equals}{value}")
        elif dot and prefix in BACKENDS:
            raise SettingError(f"'{assignment}' is for the backend {prefix}, which is not among {', '.join(names)}.")
        elif dot and prefix not in PREFIXES:
            raise SettingError(unknown("prefix of a setting", prefix, {*PREFIXES, *names}))
        else:
            shared.append(assignment)
    return shared, own
