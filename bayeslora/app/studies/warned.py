"""What fits warned of and what is said of rows: a number for each line that has some, and a table of the texts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import bayeslora
from bayeslora.app.studies.tables import Notes, Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["heard", "notes_of", "warnings_table"]

LABELS = ["task", "base", "protocol", "method"]
#: In which warnings of the same kind differ.
FIGURES = re.compile(r"-?\d(?:[\d.,e+-]*\d)?")
#: So many fits' figures stand side by side.
FEW = 3


@contextmanager
def heard() -> Iterator[list[str]]:
    """Give a list that has, after the block, what this package warned of in it, each once; it is shown all the same.

    It has them whatever is to be shown, as with ``python -W ignore``, and none of other packages.
    """
    found: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield found
    finally:
        places = [Path(each) for each in bayeslora.__path__]
        shown: dict[str | tuple[str, type[Warning], int], int] = {}
        for each in caught:
            said = str(each.message)
            if any(Path(each.filename).is_relative_to(place) for place in places) and said not in found:
                found.append(said)
            warnings.warn_explicit(said, each.category, each.filename, each.lineno, registry=shown)


def notes_of(frame: pd.DataFrame) -> Notes:
    """A number for each task, base, protocol and method with a result of which a fit warned of something.

    Args:
        frame: see `bayeslora.app.studies.frame.frame_of`.
    """
    if "warnings" not in frame:  # nothing was chosen yet
        return {}
    said = (frame["state"] == "done") & (frame["warnings"].fillna("") != "")
    warned = frame[said][LABELS].drop_duplicates()
    return {(row[0], row[1], row[2], row[3]): number for number, row in enumerate(warned.to_numpy().tolist(), 1)}


def warnings_table(frame: pd.DataFrame, notes: Notes) -> Table:
    """What was said, and of how many of a line's fits; where texts differ in their figures, those of a few of them."""
    done, rows = frame[frame["state"] == "done"], []
    for labels, number in notes.items():
        of_all = done[(done[LABELS] == list(labels)).all(axis=1)]
        texts: dict[tuple[str, ...], list[tuple[int, str]]] = {}
        for seed, said in zip(of_all["seed"], of_all["warnings"], strict=True):
            kinds = {tuple(FIGURES.split(text)): text for text in said.splitlines()}
            for kind, text in kinds.items():
                texts.setdefault(kind, []).append((seed, text))
        for found in texts.values():
            task, base, protocol, method = labels
            seeds = ", ".join(dict.fromkeys(str(seed) for seed, _ in found))
            said = _together([text for _, text in found]).replace("|", "/")
            place = f"{task}, {base}, {method}"
            rows.append([f"[{number}]", place, protocol, f"{len(found)} of {len(of_all)}", seeds, said])
    note = (
        f"Where fits differ in their figures, those of the first {FEW} stand side by side, in the order of the seeds "
        "and of the points of a grid."
    )
    return Table("Warnings", ["", "of", "settings", "fits", "seeds", "what was said"], rows, note)


def _together(texts: Sequence[str]) -> str:
    """One text for several that differ in their figures alone: where they do, it has those of the first few."""
    differing = list(dict.fromkeys(texts))
    more = ["..."] if len(differing) > FEW else []
    places = zip(*map(FIGURES.findall, differing), strict=True)
    figures = iter([each[0] if len(set(each)) == 1 else " / ".join([*each[:FEW], *more]) for each in places])
    return FIGURES.sub(lambda figure: next(figures), differing[0])
