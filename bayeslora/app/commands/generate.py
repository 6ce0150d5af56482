"""Let a posterior write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayeslora.app.options import BatchSize, Draws, MovedBase, MovedData, Run, check_apart, new_file
from bayeslora.app.terminal import show
from bayeslora.errors import SettingError

__all__ = ["generate"]


def generate(
    run: Run,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What the network reads; repeatable.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Rows with a column 'prompt', or those of the task: .csv, .tsv, .jsonl, .json or .parquet.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Rows of the task, by the name of the split.", show_default=False)
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Another task of the same kind; with --split.", show_default="the run's own")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Rows of the split, the first ones.", min=1, show_default="all")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Share of answers that are right, as gsm8k's are read, or of programs that pass their tests "
            "(humaneval); with --split.",
            show_default=False,
        ),
    ] = None,
    run_programs: Annotated[
        bool, typer.Option("--run-programs", help="Run what is written on this machine, under limits.")
    ] = False,
    data_dir: MovedData = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=new_file, metavar="FILE", help="Write JSON lines, one a prompt.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(help="Texts after each prompt.", min=1)] = 1,
    method: Annotated[
        str, typer.Option(help="draw (one draw of the weights a text), mixture (of all draws), or mean.")
    ] = "draw",
    draws: Draws = 10,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a text.", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(help="1 samples from the posterior predictive, 0 is greedy.", min=0)
    ] = 1,
    top_p: Annotated[float, typer.Option(help="Probability of the tokens to choose among.", max=1)] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text at which a text ends; repeatable.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws and the texts.", min=0, max=2**32 - 1)] = 0,
    batch_size: BatchSize = 8,
    base: MovedBase = None,
) -> None:
    """Go on after prompts, and say how sure the posterior is of each text."""
    from bayeslora.app import runs
    from bayeslora.app.generations import check_score, generate_file, generate_here, generate_split

    if sum(map(bool, (prompt, file, split))) != 1:
        raise SettingError("generate takes prompts, a file or a split of them: give one of --prompt, --file, --split.")
    if prompt is None and output is None:
        raise SettingError("What is generated for many rows goes into a file: give --output FILE.jsonl.")
    if task and not split:
        raise SettingError("Rows of another task go by the name of their split: give --split, such as --split test.")
    check_score(score, split, run_programs)
    if file is not None and output is not None:
        check_apart(file, output)
    posterior = runs.opened(run, base)
    settings = {
        "samples": samples,
        "method": method,
        "draws": draws,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop": tuple(stop or ()),
        "seed": seed,
    }
    if prompt:
        generate_here(posterior, prompt, output, **settings)
    elif split is not None and output is not None:
        rows = runs.saved_task(posterior, task, data_dir).split(split)
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        show(generate_split(posterior, rows, output, score, batch_size=batch_size, **settings))
    elif file is not None and output is not None:
        count = generate_file(posterior, file, output, batch_size=batch_size, **settings)
        show(f"{count:,} prompts of {file} answered by {posterior.record.backend}. Written into {output}")
