"""Predict new rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayeslora.app.options import BatchSize, Draws, Method, MovedBase, Run, check_apart, new_file
from bayeslora.app.terminal import show

__all__ = ["predict"]


def predict(
    run: Run,
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
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="Column of the file to copy into the table; repeatable.", show_default=False
        ),
    ] = None,
    draws: Draws = 10,
    method: Method = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0, max=2**32 - 1)] = 0,
    batch_size: BatchSize = 64,
    base: MovedBase = None,
) -> None:
    """Predict the rows of a file: class, probabilities, entropy and mutual information of each, in their order."""
    from bayeslora.app import runs
    from bayeslora.app.predictions import check_table, predict_file

    check_table(output)  # before the work
    check_apart(file, output)
    posterior = runs.opened(run, base)
    settings = {"draws": draws, "method": method, "seed": seed, "batch_size": batch_size}
    count = predict_file(posterior, file, output, tuple(dict.fromkeys(keep or ())), **settings)
    show(f"{count:,} rows of {file} predicted by {posterior.record.backend}. Written into {output}")
