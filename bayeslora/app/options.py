"""Options that several commands have, as types of their parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bayeslora.errors import DataError

__all__ = [
    "AdapterFolder",
    "Assignments",
    "Base",
    "BatchSize",
    "ConfigFile",
    "DataDir",
    "Draws",
    "HeldoutSize",
    "Method",
    "Model",
    "MovedBase",
    "MovedData",
    "Preset",
    "Run",
    "Split",
    "TaskName",
    "TrainSize",
    "check_apart",
    "new_file",
    "new_folder",
]

Base = Annotated[str | None, typer.Option(help="Base network: folder, hub name, or 'demo'.", show_default=False)]
AdapterFolder = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="PEFT LoRA adapter to start from, in place of a fresh one; of a run of several fits, the first one's.",
        show_default=False,
    ),
]
TaskName = Annotated[
    str | None, typer.Option(help="Known task, or path or hub name of your own data.", show_default=False)
]
DataDir = Annotated[
    str | None,
    typer.Option(help="Folder with the task's files; without it they come from the hub.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Pyro model of the weights.",
        show_default="monteclora; gaussian for laplace and ivon",
    ),
]
Preset = Annotated[str | None, typer.Option(help="Published settings, over which all others go.", show_default=False)]
TrainSize = Annotated[int | None, typer.Option(help="Number of training rows.", show_default="all")]
HeldoutSize = Annotated[int | None, typer.Option(help="Training rows to set aside.", show_default="0")]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the backend (epochs=3), or of guide., of., model., network., observation., lora. or task. "
        "(lora.r=16); repeatable.",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file with the same settings; flags go over it.", show_default=False),
]
Split = Annotated[str, typer.Option(help="Rows to predict: validation, test, heldout or another split of the data.")]
Draws = Annotated[int, typer.Option(help="Number of weight draws; the links of laplace take none.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Rows a pass: less takes less memory.", min=1)]
Run = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]
MovedData = Annotated[
    str | None, typer.Option(help="Where the task's files are now, if they have moved.", show_default=False)
]
MovedBase = Annotated[
    str | None, typer.Option("--base", help="Where the base network is now, if it has moved.", show_default=False)
]
Method = Annotated[
    str | None,
    typer.Option(
        help="'sample' averages over draws, 'pairs' over draws on both sides of svi's mean, 'mean' is plain LoRA at "
        "the posterior mean (of several fits, the average over each); laplace has links besides; 'tempered' is the "
        "posterior's own way under a temperature that the fit chose.",
        show_default="the posterior's own",
    ),
]


def _to_write(text: str, is_folder: bool) -> Path:
    """A path that can be written to, which is known before the work."""
    path = Path(text).expanduser()
    if not text.strip():
        raise typer.BadParameter("the path is empty.")
    if path.exists() and path.is_dir() != is_folder:
        raise typer.BadParameter(f"'{path}' is {'a file' if is_folder else 'a folder'}.")
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not (there.is_dir() or there == path) or not os.access(there, os.W_OK):
        raise typer.BadParameter(f"'{path}' cannot be written: '{there}' is no folder that one may write into.")
    return path


def check_apart(source: Path, target: Path) -> None:
    """Make sure that the file that is read is not written over.

    Raises:
        DataError: both are one.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise DataError(f"'{target}' is the file that is read, and would be lost: choose another one to write.")


def new_file(text: str) -> Path:
    """A file to write."""
    return _to_write(text, is_folder=False)


def new_folder(text: str) -> Path:
    """A folder to write into."""
    return _to_write(text, is_folder=True)
