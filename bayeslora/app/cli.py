"""The command line: fit, evaluate, predict, diagnose, compare, list.

What is heavy is imported inside the commands, so that help comes at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bayeslora.app.config import RENAMED
from bayeslora.app.options import (
    AdapterFolder,
    Assignments,
    Base,
    BatchSize,
    ConfigFile,
    DataDir,
    Draws,
    HeldoutSize,
    Method,
    Model,
    MovedBase,
    Split,
    TaskName,
    TrainSize,
    new_file,
    new_folder,
)
from bayeslora.app.terminal import cost_line, explain, metrics_table, new_table, quiet, say, show, show_classes
from bayeslora.errors import BayesLoraError, SettingError, unknown
from bayeslora.signals import acted_on

__all__ = ["app", "main"]

FAILED = 2


class Commands(TyperGroup):
    """Commands whose expected failures end in one message on standard error."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; exit with 2 on an error that a user can act on and with 128 + n on signal n."""
        ctx.ensure_object(dict)
        try:
            with acted_on():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            say("Interrupted.", ctx.obj.get("resume", str)())
            ctx.exit(128 + getattr(stop, "number", signal.SIGINT))
        except (BayesLoraError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            say(f"Error: {error}", explain(error))
            ctx.exit(FAILED)
        except Exception as error:
            # Exits and usage errors of typer are its own; what is left is a fault of a library below, or of this one.
            if ctx.params.get("debug") or type(error).__module__.startswith(("typer", "click")):
                raise
            say(f"Error: {type(error).__name__}: {error}", explain(error))
            ctx.exit(FAILED)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Bayesian LoRA of Hugging Face transformers: one program, many inference algorithms.",
)
listing = typer.Typer(no_args_is_help=True, help="What there is to choose from.")
app.add_typer(listing, name="list")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(help="File of your own that calls bayeslora.register; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Bayesian LoRA of Hugging Face transformers: one program, many inference algorithms."""
    from bayeslora.registry import load_file

    if not debug:
        quiet()
    for path in plugin or ():
        load_file(path)


@app.command()
def fit(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(parser=new_folder, metavar="FOLDER", help="Folder of the run.", show_default=False)
    ],
    base: Base = None,
    adapter: AdapterFolder = None,
    task: TaskName = None,
    data_dir: DataDir = None,
    backend: Annotated[str | None, typer.Option(help="Inference algorithm.", show_default="svi")] = None,
    model: Model = None,
    train_size: TrainSize = None,
    heldout_size: HeldoutSize = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the rows, the initial weights and the fit.", show_default="0")
    ] = None,
    chains: Annotated[
        int | None, typer.Option(help="Independent fits, whose mixture is the posterior.", show_default="1")
    ] = None,
    assignments: Assignments = None,
    config: ConfigFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
) -> None:
    """Fit a posterior and write it, with its configuration, into a folder."""
    from bayeslora import store
    from bayeslora.app import runs
    from bayeslora.app.config import read_config, resolve

    flags = {
        "base": base, "adapter": adapter, "task": task, "data_dir": data_dir, "backend": backend, "model": model,
        "train_size": train_size, "heldout_size": heldout_size, "seed": seed, "chains": chains, "output": str(output),
    }  # fmt: skip
    given = config or assignments or any(flags[name] is not None for name in flags if name != "output")
    if resume and not given:
        run = runs.saved_config(output)
    else:
        run = resolve(read_config(config, flags, assignments or ()))
    again = f"Go on with: bayeslora fit --resume --output {output}"
    context.obj["resume"] = lambda: again if (output / store.CONFIG).exists() else "Nothing was fitted yet."
    posterior = runs.fit(run, output, resume=resume, overwrite=overwrite)
    spent = cost_line(posterior.cost)
    show(f"{run.backend} on {posterior.record.n_data:,} rows of {run.task}: {spent}. Saved in {output}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    task: Annotated[
        str | None, typer.Option(help="Another task with the same classes.", show_default="the run's own")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Where the task's files are now, if they have moved.", show_default=False)
    ] = None,
    split: Split = "validation",
    draws: Draws = 10,
    method: Method = None,
    seed: Annotated[int, typer.Option(help="Of the draws and of the intervals.", min=0, max=2**32 - 1)] = 0,
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
    """Predict the rows of a split and measure accuracy and calibration, each with a 95 % interval."""
    from bayeslora import files
    from bayeslora.app import runs
    from bayeslora.inference import load
    from bayeslora.predict.measure import measure, true_probabilities
    from bayeslora.predict.plots import figure_format, reliability_diagram, save_figure

    settings = _of_another_task("evaluate", assignments, task)
    if plot is not None:
        figure_format(plot)  # before the work
    posterior = load(run, base)
    reported = runs.saved_task(posterior, task, data_dir, settings)
    say(*reported.notes)
    rows = reported.split(split)
    prediction = posterior.predict(rows, draws, method, seed, batch_size)
    found, finished = measure(prediction, rows, seed), posterior.record.finished
    title = f"{posterior.record.backend} on {rows.spec.name}, {split}" + ("" if finished else " (not finished)")
    if not finished:
        say(f"The fit in {run} was stopped: what is evaluated is how far it had come.")
    if json is not None:
        files.write_json(json, found.to_dict() | {"finished": finished})
    if plot is not None:
        save_figure(reliability_diagram(prediction, truth=true_probabilities(rows), title=title), plot)
    show(metrics_table(found, title))


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    file: Annotated[
        Path,
        typer.Option(help="New rows: .csv, .tsv, .jsonl, .json or .parquet; no labels needed.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            parser=new_file, metavar="FILE", help="Table to write: .csv, .jsonl or .parquet.", show_default=False
        ),
    ],
    draws: Draws = 10,
    method: Method = None,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**32 - 1)] = 0,
    batch_size: BatchSize = 64,
    base: MovedBase = None,
) -> None:
    """Predict the rows of a file: class, probabilities, entropy and mutual information of each, in their order."""
    from bayeslora.app.predictions import check_table, predict_file
    from bayeslora.inference import load

    check_table(output)  # before the work
    posterior = load(run, base)
    count = predict_file(posterior, file, output, draws=draws, method=method, seed=seed, batch_size=batch_size)
    show(f"{count:,} rows of {file} predicted by {posterior.record.backend}. Written into {output}")


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    output: Annotated[
        Path, typer.Option(parser=new_folder, metavar="FOLDER", help="Folder of the report.", show_default=False)
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Another task with the same classes, to report on.", show_default="the run's own"),
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Where the tasks' files are now, if they have moved.", show_default=False)
    ] = None,
    split: Split = "validation",
    other: Annotated[
        str | None,
        typer.Option(help="Split of rows of another kind, which uncertainty should notice.", show_default=False),
    ] = None,
    draws: Annotated[
        int, typer.Option(help="Weight draws of each chain; each takes a pass over the training rows.")
    ] = 100,
    block_draws: Annotated[
        int, typer.Option(help="Draws for k-hat of each layer of the network.", show_default="0: leave it out")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**32 - 1)] = 0,
    batch_size: BatchSize = 64,
    base: MovedBase = None,
    assignments: Assignments = None,
) -> None:
    """Say how near a posterior is to the true one, how good the model is, and what its probabilities are worth.

    Writes posterior.nc (for arviz), diagnosis.md, diagnosis.json and pictures. Without the training rows there is
    neither k-hat nor leave-one-out.
    """
    from bayeslora.app import runs
    from bayeslora.diagnostics import diagnose as ask
    from bayeslora.inference import load

    settings = _of_another_task("diagnose", assignments, task)
    posterior = load(run, base)
    own = runs.saved_task(posterior, None, data_dir)
    reported = own if task is None else runs.saved_task(posterior, task, data_dir, settings)
    say(*reported.notes)
    if not posterior.record.finished:
        say(f"The fit in {run} was stopped: what is diagnosed is how far it had come.")
    found = ask(
        posterior,
        reported.split(split),
        own.roles.get("train"),
        None if other is None else reported.split(other),
        draws=draws,
        block_draws=block_draws,
        seed=seed,
        batch_size=batch_size,
    )
    title = f"{posterior.record.backend} on {reported.spec.name}"
    found.save(output, title if posterior.record.finished else f"{title} (not finished)")
    for question, sentences in found.verdicts.items():
        show("\n".join([question, *(f"  {sentence}" for sentence in sentences)]))
    show(f"Written into {output}: diagnosis.md, posterior.nc and {len(found.pictures)} pictures.")


@app.command()
def compare(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(parser=new_folder, metavar="FOLDER", help="Folder of the comparison.", show_default=False)
    ],
    backends: Annotated[str, typer.Option(help="Inference algorithms, separated by commas.", show_default=False)],
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
) -> None:
    """Fit several backends with several seeds and put them into one table.

    Settings go to every backend; one with the backend's name before it, such as svi.particles=4, to that one alone.
    The same command again goes on with a comparison that was stopped.
    """
    from bayeslora.app.comparison import Evaluation
    from bayeslora.app.comparison import compare as run_all
    from bayeslora.app.config import read_config

    flags = {
        "base": base, "task": task, "data_dir": data_dir, "model": model, "train_size": train_size,
        "heldout_size": heldout_size,
    }  # fmt: skip
    names = _words(backends)
    if len(set(names)) < len(names):
        raise SettingError(f"A backend is given twice: {', '.join(names)}.")
    shared, own = _by_backend(assignments or [], names)
    context.obj["resume"] = lambda: "The same command goes on from there."
    found = run_all(
        read_config(config, flags, shared),
        {name: {"backend": name, "settings": own[name]} for name in names},
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


Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the settings of each.")]


@listing.command("backends")
def list_backends(verbose: Verbose = False) -> None:
    """Inference algorithms, and with -v their settings."""
    from bayeslora.inference import BACKENDS

    classes = {name: BACKENDS[name] for name in BACKENDS}
    show_classes("backends", classes, {name: cls.paper for name, cls in classes.items()}, verbose)


@listing.command("models")
def list_models(verbose: Verbose = False) -> None:
    """Pyro models of the LoRA weights (--model), and with -v their settings."""
    from bayeslora.models import MODELS

    show_classes("models", {name: MODELS[name] for name in MODELS}, {}, verbose)


@listing.command("tasks")
def list_tasks() -> None:
    """Tasks that are known by name; "*" stands for a configuration, as in mmlu/*."""
    from bayeslora.tasks import task_names

    show("\n".join(task_names()))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``--debug`` and ``--plugin`` may stand anywhere."""
    words = iter(sys.argv[1:] if arguments is None else arguments)
    first: list[str] = []
    rest: list[str] = []
    for word in words:
        if (flag := word.partition("=")[0]) in RENAMED:
            say(f"Error: {flag} is now {RENAMED[flag]}.")
            sys.exit(FAILED)
        if word == "--plugin":
            first += [word, *([value] if (value := next(words, None)) is not None else [])]
        elif word == "--debug" or word.startswith("--plugin="):
            first.append(word)
        else:
            rest.append(word)
    app(first + rest, prog_name="bayeslora")


def _of_another_task(command: str, assignments: list[str] | None, task: str | None) -> dict[str, Any]:
    """Settings of a task that is not the run's own."""
    from bayeslora.app.config import assign, task_settings

    settings = assign({}, assignments or ())
    if set(settings) - {"task_settings"} or (settings and task is None):
        raise SettingError(
            f"{command} takes --set for settings of another task (--task) alone, such as task.label=answer."
        )
    return task_settings(settings.get("task_settings", {}))


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


if __name__ == "__main__":
    main()
