"""Measure a posterior by the tasks of the evaluation harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayeslora.app.options import BatchSize, Draws, MovedBase, Run, new_file
from bayeslora.app.terminal import show

__all__ = ["lm_eval"]


def lm_eval(
    run: Run,
    tasks: Annotated[
        list[str],
        typer.Option(help="Task or group of the harness, or a YAML file of one; repeatable.", show_default=False),
    ],
    average: Annotated[
        str,
        typer.Option(
            help="Over draws: sequence (probability of a text), choices (softmax over a document's choices, where "
            "acc_norm means nothing), or mean (one pass at the posterior mean, of several fits one for each)."
        ),
    ] = "sequence",
    draws: Draws = 10,
    method: Annotated[
        str | None,
        typer.Option(
            help="How texts are generated: draw (one draw of the weights a text), mixture (of all draws), or mean.",
            show_default="mixture; mean for --average mean",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task.", min=1, show_default="all")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question.", min=0, show_default="the task's own")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask by the tokenizer's chat template.")] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own.", exists=True, file_okay=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=new_file, metavar="FILE", help="Write the results into a JSON file.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws and the texts.", min=0, max=2**32 - 1)] = 0,
    batch_size: BatchSize = 8,
    base: MovedBase = None,
) -> None:
    """Measure by the tasks of the evaluation harness (lm-eval), with probabilities averaged over draws."""
    from bayeslora.app import runs
    from bayeslora.harness import PosteriorLM, evaluate, tables, write

    posterior = runs.opened(run, base)
    model = PosteriorLM(posterior, average, draws=draws, method=method, seed=seed, batch_size=batch_size)
    found = evaluate(model, tasks, include_path, limit=limit, num_fewshot=num_fewshot, chat=chat)
    if output is not None:
        write(output, found)
    show(f"{posterior.record.backend}, {model}")
    show(tables(found))
