"""Ask how far a posterior can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayeslora.app.commands.evaluate import of_another_task
from bayeslora.app.options import Assignments, BatchSize, MovedBase, MovedData, Run, Split, new_folder
from bayeslora.app.terminal import say, show

__all__ = ["diagnose"]


def diagnose(
    run: Run,
    output: Annotated[
        Path, typer.Option(parser=new_folder, metavar="FOLDER", help="Folder of the report.", show_default=False)
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Another task with the same classes, to report on.", show_default="the run's own"),
    ] = None,
    data_dir: MovedData = None,
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
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0, max=2**32 - 1)] = 0,
    batch_size: BatchSize = 64,
    base: MovedBase = None,
    assignments: Assignments = None,
) -> None:
    """Say how near a posterior is to the true one, how good the model is, and what its probabilities are worth.

    Writes posterior.nc (for arviz), diagnosis.md, diagnosis.json and pictures. Without the training rows there is
    neither k-hat nor leave-one-out.
    """
    from bayeslora.app import runs
    from bayeslora.app.seen import flattered
    from bayeslora.diagnostics import diagnose as ask

    settings = of_another_task("diagnose", assignments, task)
    posterior = runs.opened(run, base)
    own = runs.saved_task(posterior, None, data_dir)
    reported = own if task is None else runs.saved_task(posterior, task, data_dir, settings)
    rows = reported.split(split)
    others = {} if other is None else {other: reported.split(other)}
    looked_at = {split: rows} | others
    say(*reported.notes, *(line for name in looked_at for line in flattered(posterior, looked_at[name], name)))
    found = ask(
        posterior,
        rows,
        own.roles.get("train"),
        None if other is None else others[other],
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
