"""Options that several commands have, as types of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    "Split",
    "TaskName",
    "TrainSize",
]

Base = Annotated[str | None, typer.Option(help="Base network: folder, hub name, or 'demo'.", show_default=False)]
AdapterFolder = Annotated[
    str | None,
    typer.Option("--adapter", help="PEFT LoRA adapter to start from, in place of a fresh one.", show_default=False),
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
        show_default="monteclora; gaussian for an adapter given to laplace",
    ),
]
TrainSize = Annotated[int | None, typer.Option(help="Number of training rows.", show_default="all")]
HeldoutSize = Annotated[int | None, typer.Option(help="Training rows to set aside.", show_default="0")]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the backend (epochs=3), or of program., lora. or task. (lora.r=16); may be repeated.",
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
MovedBase = Annotated[
    str | None, typer.Option("--base", help="Where the base network is now, if it has moved.", show_default=False)
]
Method = Annotated[
    str | None,
    typer.Option(
        help="'sample' averages over draws, 'mean' is plain LoRA at the posterior mean; laplace has links besides.",
        show_default="the posterior's own",
    ),
]
