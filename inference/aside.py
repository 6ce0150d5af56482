"""Training rows that are set aside, so that something can be chosen on rows that the weights have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bayeslora.errors import SettingError
from bayeslora.inference.base import Backend, Run, rows_wanted
from bayeslora.observations import digest
from bayeslora.passes import Rows
from bayeslora.predict.temperature import Temperable
from bayeslora.progress import note

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.posterior import Posterior
    from bayeslora.program import Program
    from bayeslora.tasks import Split

__all__ = [
    "ENOUGH",
    "MOST",
    "PART",
    "check_asked",
    "chose_on",
    "has_temperature",
    "rows_aside",
    "set_aside",
    "stratified",
]

#: Of the training rows one in so many is set aside, and no more than MOST: one or two numbers are chosen on them. From
#: ENOUGH on they say more than what can be told without them.
PART, MOST, ENOUGH = 10, 1000, 30


def rows_aside(asked: int | None, rows: int, run: Run, *, seen: bool, purpose: str, least: int = ENOUGH) -> int:
    """How many of so many training rows are set aside: as many as a setting ``heldout_size`` says, or a tenth.

    It is a tenth, but 1,000 at most, where nothing is said, and none where the run has other rows, what is given to
    start from may have seen these, or a tenth is too few.

    Args:
        asked: what the setting says; None: nothing.
        rows: of training.
        run: which may have others.
        seen: whether what is given to start from may have seen them.
        purpose: what they are for, for messages.
        least: so few of them that they say something.

    Raises:
        SettingError: some are asked for, and there are others, or not enough, or they may have been seen.
    """
    if asked:
        check_asked(asked, rows, run, seen, purpose)
        return asked
    if asked == 0 or seen or run.heldout is not None:
        return 0
    tenth = min(rows // PART, MOST)
    return tenth if tenth >= least else 0


def check_asked(size: int, rows: int, run: Run, seen: bool, purpose: str) -> None:
    """Make sure that so many training rows can be set aside; arguments are those of `rows_aside`.

    Raises:
        SettingError: there are others, or not enough, or they may have been seen.
    """
    asked = f"{size} training rows would be set aside {purpose} (heldout_size)"
    if run.heldout is not None:
        raise SettingError(f"{asked}, and fit was given heldout=... for that: give only one of the two.")
    if seen:
        raise SettingError(
            f"{asked}, and the weights that were given may have seen them: give fit(..., heldout=...) rows that they "
            "have not (in a shell --heldout-size, with the --train-size and --seed of the adapter's own run)."
        )
    if size >= rows:
        raise SettingError(f"{asked}, and there are {rows} rows: some must be left to train on.")


def has_temperature(program: Program) -> bool:
    """Whether predictions can have a temperature: those of classes and of real labels."""
    return issubclass(program.observation.prediction, Temperable)


def set_aside(algorithm: Backend, program: Program, rows: Dataset, run: Run) -> tuple[Dataset, Run]:
    """The rows to train on, and the run with those that the algorithm wants to choose something on; that is said."""
    size = rows_wanted(algorithm, program, len(rows), run)
    if not size:
        return rows, run
    numbers = stratified(rows["labels"][:], size, run.seed)
    kept = rows.select(sorted(set(range(len(rows))).difference(numbers)))
    note(
        f"{size:,} of {len(rows):,} training rows are set aside: {algorithm.name} chooses on them what training cannot "
        "tell. heldout_size sets how many.",
        run.progress,
    )
    return kept, replace(run, heldout=rows.select(numbers), aside=tuple(numbers))


def chose_on(posterior: Posterior, data: Split | Dataset | Rows) -> bool:
    """Whether the fit chose something, such as a temperature, on these very rows, which then look better than others.

    Args:
        posterior: that says so in its record.
        data: rows, which are none of these if they have no labels.
    """
    fits = (posterior, *posterior.chains)
    if not any(name in row for name in ("heldout_nll", "search_nll") for fit in fits for row in fit.record.history):
        return False
    rows = Rows.of(posterior.program, data)
    return rows.labels is not None and posterior.record.tuned_on == digest(rows.dataset)


def stratified(labels: Sequence[Any], size: int, seed: int) -> list[int]:
    """Numbers of as many rows at random, in ascending order, with each label's share of them but for one row.

    Numbers as labels are in order, and every so manieth row is taken; of whole texts no two are alike.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    if isinstance(labels[0], int | float):
        order.sort(key=labels.__getitem__)
    return sorted(order[(2 * number + 1) * len(labels) // (2 * size)] for number in range(size))
