"""Show what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

from bayeslora.app.terminal import show, show_classes

__all__ = ["list_backends", "list_models", "list_tasks"]

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the settings of each.")]


def list_backends(verbose: Verbose = False) -> None:
    """Inference algorithms, and with -v their settings."""
    from bayeslora.inference import BACKENDS

    classes = {name: BACKENDS[name] for name in BACKENDS}
    show_classes("backends", classes, {name: cls.paper for name, cls in classes.items()}, verbose)


def list_models(verbose: Verbose = False) -> None:
    """Pyro models of the LoRA weights (--model), and with -v their settings."""
    from bayeslora.models import MODELS

    show_classes("models", {name: MODELS[name] for name in MODELS}, {}, verbose)


def list_tasks() -> None:
    """Tasks that are known by name; "*" stands for a configuration, as in mmlu/*."""
    from bayeslora.tasks import task_names

    show("\n".join(task_names()))
