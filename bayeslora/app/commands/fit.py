"""Fit a posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayeslora.app.options import (
    AdapterFolder,
    Assignments,
    Base,
    ConfigFile,
    DataDir,
    HeldoutSize,
    Model,
    Preset,
    TaskName,
    TrainSize,
    new_folder,
)
from bayeslora.app.terminal import cost_line, show

__all__ = ["fit"]


def fit(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(parser=new_folder, metavar="FOLDER", help="Folder of the run.", show_default=False)
    ],
    base: Base = None,
    adapter: AdapterFolder = None,
    task: TaskName = None,
    data_dir: DataDir = None,
    preset: Preset = None,
    backend: Annotated[str | None, typer.Option(help="Inference algorithm.", show_default="svi")] = None,
    model: Model = None,
    lora: Annotated[
        str | None, typer.Option(help="Way to fine-tune, such as dora or full.", show_default="lora")
    ] = None,
    observation: Annotated[
        str | None,
        typer.Option(help="What is read of the network's output.", show_default="what task and base call for"),
    ] = None,
    train_size: TrainSize = None,
    heldout_size: HeldoutSize = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the rows, the initial weights and the fit.", show_default="0")
    ] = None,
    chains: Annotated[
        int | None, typer.Option(help="Independent fits, whose mixture is the posterior.", show_default="1")
    ] = None,
    assignments: Assignments = None,
    config: ConfigFile = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder, as it was begun.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
) -> None:
    """Fit a posterior and write it, with its configuration, into a folder."""
    from bayeslora import store
    from bayeslora.app import runs
    from bayeslora.app.config import read_config

    flags = {
        "base": base, "adapter": adapter, "task": task, "data_dir": data_dir, "preset": preset, "backend": backend,
        "model": model, "observation": observation, "train_size": train_size, "heldout_size": heldout_size,
        "seed": seed, "chains": chains, "output": str(output),
    }  # fmt: skip
    assignments = [*([f"lora.method={lora}"] if lora else []), *(assignments or ())]
    said = assignments or any(flags[name] is not None for name in flags if name != "output")
    if resume and config is None and (store.holds_fit(store.current(output)) or not said):
        flags = runs.as_begun(output, flags, lora)
    run = read_config(config, flags, assignments)
    again = f"Go on with: bayeslora fit --resume --output {output}"
    context.obj["resume"] = lambda: again if (output / store.CONFIG).exists() else "Nothing was fitted yet."
    posterior = runs.fit(run, output, resume=resume, overwrite=overwrite)
    spent = cost_line(posterior.record.cost)
    show(f"{posterior.record.backend} on {posterior.record.n_data:,} rows of {run.task}: {spent}. Saved in {output}")
