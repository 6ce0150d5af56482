"""What the command line shows: tables, messages and what to do about an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

import typer

from bayeslora.errors import BayesLoraError

if TYPE_CHECKING:
    from rich.table import Table

    from bayeslora.inference.presets import Preset
    from bayeslora.predict.metrics import Metrics
    from bayeslora.predict.resampling import Interval

#: Of an ``Attributes:`` section: indentation, name, perhaps a type, and text, which may go on in deeper lines.
ENTRY = re.compile(r"^( +)(\w+) *(?:\([^)]*\))?:(.*(?:\n\1 +\S.*)*)", re.MULTILINE)

__all__ = [
    "cost_line",
    "described",
    "explain",
    "first_line",
    "intervals_table",
    "metrics_table",
    "new_table",
    "quiet",
    "say",
    "show",
    "show_classes",
    "show_presets",
]


def show_classes(title: str, classes: Any, papers: dict[str, str], verbose: bool) -> None:
    """A table of classes with their first line of documentation, or each with its settings."""
    if not verbose:
        table = new_table(title, ["name", "what it is", *(["paper"] if papers else [])])
        for name, cls in classes.items():
            table.add_row(name, first_line(cls), *([papers[name]] if papers else []))
        show(table)
        return
    for name, cls in classes.items():
        table = new_table(f"{name}: {first_line(cls)}", ["setting", "type", "default", "meaning"])
        for row in described(cls):
            table.add_row(*row)
        show(table)


def show_presets(presets: Mapping[str, Preset], verbose: bool) -> None:
    """A table of presets with their papers, or each with what it sets and what its note says."""
    if not verbose:
        table = new_table("presets", ["name", "backend", "model", "paper"])
        for name, preset in presets.items():
            table.add_row(name, preset.backend, preset.model, preset.paper)
        show(table)
        return
    for name, preset in presets.items():
        table = new_table(f"{name}: {preset.paper}", ["of", "setting", "value"])
        table.caption, table.caption_justify = preset.note, "left"
        for of, settings in ((preset.backend, preset.settings), (preset.model, preset.model_settings)):
            for setting, value in settings.items():
                table.add_row(of, setting, str(value))
        if preset.draws is not None:
            table.add_row("predictions (--draws)", "draws", str(preset.draws))
        show(table)


def described(cls: Any) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each setting of a dataclass, as its source has them.

    A setting that a base class documents keeps its text there, unless the class has its own.
    """
    helps: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        _, _, section = cleandoc(each.__dict__.get("__doc__") or "").partition("\nAttributes:\n")
        section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
        helps |= {name: " ".join(text.split()) for _, name, text in ENTRY.findall(section)}
    rows = []
    for field in fields(cls):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        rows.append(
            (field.name, str(field.type), "" if default is MISSING else str(default), helps.get(field.name, ""))
        )
    return rows


def first_line(cls: Any) -> str:
    """First line of a class's docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def cost_line(cost: Mapping[str, float]) -> str:
    """What a fit cost, as far as its backend says."""
    shown = {
        "parameters": (1, ",.0f", "parameters"),
        "seconds": (1, ".1f", "s"),
        "peak_memory_bytes": (2**20, ",.0f", "MiB"),
    }
    return ", ".join(f"{cost[name] / by:{style}} {unit}" for name, (by, style, unit) in shown.items() if name in cost)


def metrics_table(found: Metrics, title: str) -> Table:
    """Every metric with its interval."""
    from bayeslora.predict.resampling import INTERVAL

    table = intervals_table(found, title)
    table.caption = f"{found.n:,} rows, draws={found.draws}, method={found.method}\n{INTERVAL}s"
    return table


def intervals_table(found: Mapping[str, Interval], title: str) -> Table:
    """Values by name, each with its interval."""
    table = new_table(title, ["metric", "value", "95 % interval"])
    for name, interval in found.items():
        table.add_row(name, f"{interval.value:.4f}", f"{interval.low:.4f} to {interval.high:.4f}")
    return table


def new_table(title: str, header: list[str]) -> Table:
    """A table without rows."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in header:
        table.add_column(column)
    return table


def show(what: Any) -> None:
    """Print a text or a table."""
    from rich.console import Console

    # A path or a list must not be coloured or broken at the width of a terminal that is not there.
    console = Console(highlight=False, soft_wrap=isinstance(what, str))
    console.print(what, markup=False) if isinstance(what, str) else console.print(what)


def say(*messages: str) -> None:
    """Print messages that are not empty on standard error."""
    for message in messages:
        if message:
            typer.echo(message, err=True)


def explain(error: Exception) -> str:
    """What to do about an error of the operating system or the hub."""
    if isinstance(error, BayesLoraError) and not isinstance(error.__cause__, OSError):
        return ""
    if re.search(r"\bhub\b|huggingface|offline|connect", str(error).lower()):
        return "Without the hub, give a local folder: --base for the network, --data-dir for the data."
    return "Run with --debug for the traceback."


def quiet() -> None:
    """Keep the libraries below from telling a person what only their developers want to know."""
    import os
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"  # the line of code says nothing to a user
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_MININTERVAL": "0.5",
    }.items():
        os.environ.setdefault(name, value)
