"""Fit several methods and compare them: backends on one task by flags, or a study by its file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
from bayeslora.app.terminal import new_table, show
from bayeslora.errors import SettingError, unknown

__all__ = ["compare"]

#: Flags that say how a study is run, not what it is.
OF_STUDIES = {"study", "output", "workers", "launcher", "options", "shard", "retry", "dry_run"}


def compare(
    context: typer.Context,
    study: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file of a study; other flags than those of its running are then none.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=new_folder, metavar="FOLDER", help="Folder of the comparison.", show_default="runs/NAME of a study"
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
        int | None, typer.Option(help="Of a study: processes that share its cells.", min=1, show_default="this one")
    ] = None,
    launcher: Annotated[
        str, typer.Option(help="Of a study: what starts them: local, submitit (Slurm), ray.")
    ] = "local",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="Of the launcher (timeout_min=600); repeatable.", show_default=False
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Of a study: one of N parts of its lines, from 1 on.", show_default="all"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of a study: show its cells and what they will take, and end.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Of a study: try again what failed before.")] = False,
) -> None:
    """Fit several methods with several seeds and put them into one table.

    A file names tasks, bases, methods, seeds and settings of a study, whose cells are done one by one and kept.
    Without one, flags name backends and a task.

    Settings go to every backend; one with the backend's name before it, such as svi.particles=4, to that one alone.
    The same command again goes on with a comparison that was stopped.
    """
    context.obj["resume"] = lambda: "The same command goes on from there."
    if study is not None:
        _check_flags(context)
        if dry_run:
            _show_plan(study, output, workers or 1)
            return
        _run_study(
            study,
            output,
            workers=workers,
            launcher=launcher,
            options=_options(options or []),
            shard=_shard(shard),
            plugins=context.find_root().params.get("plugin") or (),
            retry=retry,
        )
        return
    if output is None or backends is None:
        raise SettingError("compare takes the file of a study, or --backends and --output.")
    from bayeslora.app.comparison import Evaluation
    from bayeslora.app.comparison import compare as run_all
    from bayeslora.app.config import named, read_config

    flags = {
        "base": base, "task": task, "data_dir": data_dir, "model": model, "train_size": train_size,
        "heldout_size": heldout_size,
    }  # fmt: skip
    names = _words(backends)
    if len(set(names)) < len(names):
        raise SettingError(f"A backend is given twice: {', '.join(names)}.")
    shared, own = _by_backend(assignments or [], names)
    found = run_all(
        read_config(config, flags, shared),
        {name: named(name) | {"settings": own[name]} for name in names},
        [_seed(word) for word in _words(seeds)],
        output,
        evaluation=Evaluation(split, draws, method),
    )
    header, *body = zip(*found.rows(), strict=True)  # arms side by side: metrics are many
    table = new_table(f"{found.config.task}, {split}: mean over seeds {seeds}", list(header))
    for row in body:
        table.add_row(*row)
    show(table)
    show(f"Written into {output}: comparison.md, comparison.json and a folder for each run.")
    if (output / "reliability.png").exists():
        show(f"Reliability diagram: {output / 'reliability.png'}")


def _check_flags(context: typer.Context) -> None:
    """Make sure that no flag was given which the file of a study stands for."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in OF_STUDIES and source is not None and source.name == "COMMANDLINE":
            flag = "set" if name == "assignments" else name.replace("_", "-")
            raise SettingError(f"--{flag} is said by the file of a study: write it there.")


def _run_study(file: Path, output: Path | None, **how: Any) -> None:
    from bayeslora.app.studies import Study

    study = Study(file, output)
    study.run(**how)
    report = study.report()
    for table in report.tables():
        shown = new_table(table.title, list(table.header))
        for row in table.rows:
            shown.add_row(*row)
        shown.caption, shown.caption_justify = table.note, "left"
        show(shown)
    show(f"Written into {study.results.folder / 'report'}: study.md, tables as CSV, JSON and LaTeX, and pictures.")


def _show_plan(file: Path, output: Path | None, workers: int) -> None:
    """The cells of a study, and an estimate of their time."""
    from bayeslora.app.studies import Study
    from bayeslora.app.studies.estimate import estimate
    from bayeslora.app.studies.progress import duration

    study = Study(file, output)
    for cell in study.cells:
        start = "" if cell.start is None else f", from {cell.start.name}"
        show(f"{cell.name}{start}{', done' if study.results.fitted(cell) else ''}")
    table = new_table("What is left", ["task", "base", "method", "fits", "s a fit", "s a prediction", ""])
    total = 0.0
    for each in estimate(study):
        seconds = [f"{each.fit_seconds:.1f}", f"{each.predict_seconds:.1f}"]
        table.add_row(each.task, each.base, each.method, str(each.cells), *seconds, each.error)
        total += each.cells * (each.fit_seconds + each.predict_seconds)
    show(table)
    show(f"{len(study.cells)} cells at most, about {duration(total / workers)} for {workers} at a time.")


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


def _by_backend(assignments: list[str], names: list[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Assignments for all, and settings by the backend whose name stands before them."""
    from bayeslora.app.config import PREFIXES
    from bayeslora.inference import BACKENDS

    shared: list[str] = []
    own: dict[str, dict[str, str]] = {name: {} for name in names}
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        prefix, dot, name = key.partition(".")
        if prefix in own and dot:
            own[prefix][name] = value
        elif dot and prefix in BACKENDS:
            raise SettingError(f"'{assignment}' is for the backend {prefix}, which is not among {', '.join(names)}.")
        elif dot and prefix not in PREFIXES:
            raise SettingError(unknown("prefix of a setting", prefix, {*PREFIXES, *names}))
        else:
            shared.append(assignment)
    return shared, own
