"""Show what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

from bayeslora.app.terminal import first_line, new_table, show, show_classes, show_presets

__all__ = ["list_backends", "list_guides", "list_models", "list_presets", "list_recipes", "list_tasks"]

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the settings of each.")]


def list_backends(verbose: Verbose = False) -> None:
    """Inference algorithms, and with -v their settings."""
    from bayeslora.inference import BACKENDS

    classes = dict(BACKENDS.items())
    show_classes("backends", classes, {name: cls.paper for name, cls in classes.items()}, verbose)


def list_guides(verbose: Verbose = False) -> None:
    """Guides (--set guide=NAME) beside the classes of Pyro, and with -v the settings of those that have some."""
    from bayeslora.models.guides import GUIDES
    from bayeslora.models.guides.auto import NAMED, settings_class

    if verbose:
        found = {name: settings_class(name) for name in GUIDES}
        show_classes("guides", {name: cls for name, cls in found.items() if cls is not None}, {}, verbose)
        return
    table = new_table("guides", ["name", "what it is"])
    for name, what in (NAMED | {name: first_line(GUIDES[name]) for name in GUIDES}).items():
        table.add_row(name, what)
    table.caption = "And Pyro's autoguides by the names of their classes, such as AutoNormal."
    table.caption_justify = "left"
    show(table)


def list_presets(verbose: Verbose = False) -> None:
    """Published settings (--preset), and with -v what each stands for."""
    from bayeslora.inference.presets import PRESETS

    show_presets(dict(PRESETS.items()), verbose)


def list_recipes(verbose: Verbose = False) -> None:
    """Ways to fine-tune (--lora), beside which any backend runs that makes point estimates of all that is trained.

    With -v their settings (--set lora.KEY=VALUE).
    """
    from bayeslora.recipes import RECIPES, LoraSettings

    if verbose:
        show_classes("ways to fine-tune", {"lora": LoraSettings}, {}, verbose)
        return
    table = new_table("ways to fine-tune", ["name", "what it trains", "settings (lora.)", "paper"])
    for name, recipe in RECIPES.items():
        table.add_row(name, recipe.what, ", ".join(recipe.settings), recipe.paper)
    show(table)


def list_models(verbose: Verbose = False) -> None:
    """Pyro models of the LoRA weights (--model), and with -v their settings."""
    from bayeslora.models import MODELS

    show_classes("models", dict(MODELS.items()), {}, verbose)


def list_tasks() -> None:
    """Tasks that are known by name; "*" stands for a configuration, as in mmlu/*."""
    from bayeslora.tasks import task_names

    show("\n".join(task_names()))
