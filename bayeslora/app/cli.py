"""The command line: fit, evaluate, lm-eval, predict, generate, diagnose, compare, list, tasks.

What is heavy is imported inside the commands, so that help comes at once.
"""

from __future__ import annotations

import signal
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bayeslora.app.commands.compare import compare
from bayeslora.app.commands.diagnose import diagnose
from bayeslora.app.commands.evaluate import evaluate
from bayeslora.app.commands.fit import fit
from bayeslora.app.commands.generate import generate
from bayeslora.app.commands.listing import (
    list_backends,
    list_guides,
    list_models,
    list_presets,
    list_recipes,
    list_tasks,
)
from bayeslora.app.commands.lm_eval import lm_eval
from bayeslora.app.commands.predict import predict
from bayeslora.app.commands.tasks import show_task
from bayeslora.app.terminal import explain, quiet, say
from bayeslora.errors import BayesLoraError
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
tasks = typer.Typer(no_args_is_help=True, help="What a task asks.")
app.add_typer(tasks, name="tasks")


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


for command in (fit, predict, generate, evaluate, lm_eval, diagnose, compare):
    app.command()(command)
for shown in (list_backends, list_guides, list_recipes, list_models, list_presets, list_tasks):
    listing.command(shown.__name__.removeprefix("list_"))(shown)
tasks.command("show")(show_task)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``--debug`` and ``--plugin`` may stand anywhere."""
    words = iter(sys.argv[1:] if arguments is None else arguments)
    first: list[str] = []
    rest: list[str] = []
    for word in words:
        if word == "--plugin":
            first += [word, *islice(words, 1)]
        elif word == "--debug" or word.startswith("--plugin="):
            first.append(word)
        else:
            rest.append(word)
    app(first + rest, prog_name="bayeslora")


if __name__ == "__main__":
    main()
