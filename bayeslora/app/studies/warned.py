"""What fits warned of and what is said of rows: a number for each line that has some, and a table of the texts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
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
FIGURES = re.compile(r"\d[\d.,e+-]*")


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
    """What was said, and of how many of a line's fits; where texts differ in their figures, one of them."""
    done, rows = frame[frame["state"] == "done"], []
    for labels, number in notes.items():
        of_all = done[(done[LABELS] == list(labels)).all(axis=1)]
        texts: dict[str, list[str]] = {}
        for said in of_all["warnings"]:
            kinds = {FIGURES.sub("#", text): text for text in said.splitlines()}
            for kind, text in kinds.items():
                texts.setdefault(kind, []).append(text)
        for found in texts.values():
            task, base, protocol, method = labels
            place = f"{task}, {base}, {method}"
            rows.append([f"[{number}]", place, protocol, f"{len(found)} of {len(of_all)}", found[0].replace("|", "/")])
    return Table("Warnings", ["", "of", "settings", "fits", "what was said"], rows)
