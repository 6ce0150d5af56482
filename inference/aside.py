"""Training rows that are set aside, so that something can be chosen on rows that the weights have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bayeslora.inference.base import Backend, Run
from bayeslora.progress import note

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.program import Program

__all__ = ["chosen", "set_aside"]


def set_aside(algorithm: Backend, program: Program, rows: Dataset, run: Run) -> tuple[Dataset, Run]:
    """The rows to train on, and the run with those that the algorithm wants to choose something on; that is said."""
    wanted = getattr(algorithm, "sets_aside", None)
    size = wanted(program, len(rows), run) if wanted else 0
    if not size:
        return rows, run
    numbers = chosen(rows["labels"][:], size, run.seed)
    kept = rows.select(sorted(set(range(len(rows))).difference(numbers)))
    note(
        f"{size:,} of {len(rows):,} training rows are set aside: {algorithm.name} chooses on them what training cannot "
        "tell. heldout_size sets how many.",
        run.progress,
    )
    return kept, replace(run, heldout=rows.select(numbers), aside=tuple(numbers))


def chosen(labels: Sequence[Any], size: int, seed: int) -> list[int]:
    """Numbers of as many rows at random, in ascending order, with each label's share of them but for one row.

    Numbers as labels are in order, and every so manieth row is taken; of whole texts no two are alike.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    if isinstance(labels[0], int | float):
        order.sort(key=labels.__getitem__)
    return sorted(order[(2 * number + 1) * len(labels) // (2 * size)] for number in range(size))
